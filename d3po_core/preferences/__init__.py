"""Judgements become preferences: votes, deciding among raters, gold questions."""
