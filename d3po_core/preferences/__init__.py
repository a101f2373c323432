"""Turn judgements into preferences: votes, deciding among raters, gold questions."""
