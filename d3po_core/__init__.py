"""D3PO without orchestration: sampling with exact log-probs, preferences, training, tables.

Nothing in this package imports prefect or mlflow.
"""

import logging

# peft imports bitsandbytes if it is installed, and that warns of missing 4-bit kernels, which we do not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
