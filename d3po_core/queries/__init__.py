"""Query a campaign: views, lookup by name, one locked SELECT."""
