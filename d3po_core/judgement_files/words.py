"""The words that every format of judgements knows, in lower case, and their meaning."""

# A tie that says more. "neither" is not among them: it may mean that neither is better.
BOTH_BAD = ("both bad", "both are bad", "bothbad", "both_bad", "tie (bothbad)", "neither is good", "none is good")
CHOICES = {
    **dict.fromkeys(("first", "left"), 1),
    **dict.fromkeys(("second", "right"), -1),
    **dict.fromkeys(
        ("tie", "equal", "draw", "same", "neither", "both", "both good", "both are equal", *BOTH_BAD),
        0,
    ),
}
GOOD = ("good", "yes", "true", "win", "exclusive_win", "accept", "wahr", "vrai")
BAD = ("bad", "no", "false", "lose", "exclusive_lose", "reject", "falsch", "faux")
# Diffusion-KTO's images that won some comparisons and lost others count as between good and bad.
BETWEEN = ("intersections", "win_lose", "tie")
SKIPS = ("skip", "not sure", "unsure", "don't know", "no opinion")
