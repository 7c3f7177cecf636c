"""Imported before transformers, which loads torchao wherever it is installed (extra `fp8`): without torchao's notes on
libraries for other GPUs, and torch's on what torchao will have to change."""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
