"""One module a DVC stage; `run` is the harness of them all."""

import logging
import os

# Before torch, transformers and PEFT are imported. Our own progress has rate and time left, theirs would fill the log;
# and they warn about deprecations among themselves that a user of a stage can do nothing about.
os.environ.setdefault("TQDM_DISABLE", "1")
for name in ("torch.utils._pytree", "torch.utils.cpp_extension", "bitsandbytes", "accelerate.utils.modeling"):
    logging.getLogger(name).setLevel(logging.ERROR)
