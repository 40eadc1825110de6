"""One module a DVC stage; `run` is the harness of them all."""

import logging
import os

# Before torch, transformers and PEFT are imported. Our own progress has rate and time left, theirs would fill the log;
# and they warn about deprecations among themselves that a user of a stage can do nothing about.
os.environ.setdefault("TQDM_DISABLE", "1")
# Threads that wait for each other sleep soon instead of spinning for milliseconds: a stage on a machine that does
# something else too would otherwise lose most of its time to its own waiting.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
for name in ("torch.utils._pytree", "torch.utils.cpp_extension", "bitsandbytes", "accelerate.utils.modeling"):
    logging.getLogger(name).setLevel(logging.ERROR)
