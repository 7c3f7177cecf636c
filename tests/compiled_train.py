"""train.py whose `--compile` traces graphs and differentiates them, but generates no code, which takes a minute."""

import train
from aliblip.runtime.mistakes import main_with_usage_errors
from aliblip.training.compiling import CompiledTowers

CompiledTowers.backend = "aot_eager"

if __name__ == "__main__":
    main_with_usage_errors("train.py", train.main)
