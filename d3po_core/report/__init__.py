"""A campaign's page: is it better, is it sane, which one to ship, why did it change."""
