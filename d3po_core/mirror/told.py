"""What went wrong at a store, in words for a person."""

import re

from d3po_core.urls import masked

_NO_BUCKET = r"NoSuchBucket|ContainerNotFound|bucket does not exist"
_NO_CREDENTIALS = (
    r"169\.254\.169\.254|metadata\.google|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken"
    r"|Unauthenticated|401 Unauthorized|Account must be specified|Invalid Access Key"
)
# Variables that hold a store's credentials, by the scheme of its address.
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
# Patterns in order; the first that fits is told. A store's clock check and a wrong key are also 403.
_TOLD = (
    (r"RequestTimeTooSkewed", "refuses this machine's clock, which is minutes off; set it (NTP)"),
    (_NO_BUCKET, "has no such bucket; make it, or correct the address"),
    (_NO_CREDENTIALS, "got no credentials that it accepts; set {credentials}"),
    (
        r"AccessDenied|403 Forbidden|[Pp]ermission denied|lacks the necessary permissions",
        "denies permission; this key must be allowed to read, write, list and delete there",
    ),
    (r"\b503 [A-Z]|SlowDown|ServiceUnavailable", "is busy (503)"),
    (r"\b50[024] [A-Z]|InternalError", "has an error of its own (5xx)"),
    (r"timed out|timeout|TimedOut", "does not answer in time"),
    (r"No space left", "is full"),
    (r"error sending request|dns error|[Cc]onnection|connect error", "cannot be reached"),
)


def in_words(error: Exception, scheme: str = "s3") -> str:
    """Return what went wrong at a store, as the end of a sentence; its address has the scheme s3, gs, az or file."""
    # The first part says what the store said; the causes of a failed request come after it.
    for text in (str(error).partition("Debug source")[0].replace("retry_timeout", ""), str(error)):
        for pattern, words in _TOLD[:-1] if text != str(error) else _TOLD:
            if re.search(pattern, text.replace("retry_timeout", "")):
                return words.format(credentials=_CREDENTIALS.get(scheme, "those of your store"))
    return f"failed ({first_line(error)})"


def names_no_bucket(text: str) -> bool:
    """Return whether a store's answer says that the bucket, not the object, does not exist."""
    return bool(re.search(_NO_BUCKET, text))


def first_line(error: Exception) -> str:
    """Return the start of an error's text in one line, without secrets."""
    return masked(" ".join(str(error).partition("Debug source")[0].split()))[:200]
