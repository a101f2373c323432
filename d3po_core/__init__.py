"""D3PO without orchestration: sampling with exact log-probs, preferences, training, tables.

Nothing in this package imports prefect or mlflow.
"""

import logging

# If it is installed, peft imports it, and it complains of missing kernels for 4 bits, which nobody asks it for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
