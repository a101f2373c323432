"""The campaign in object storage: what is put there, who may write, how another machine goes on with it."""
