"""train.py, writing down the rows of every batch it takes: one line a batch in $ALIBLIP_ROWS/rows-rank<R>.jsonl.

With $ALIBLIP_BREAK="3 4" the loss of the last rank is NaN in these batches of the first epoch; with $ALIBLIP_RAISE="3"
the last rank fails in this batch of the first epoch; with $ALIBLIP_PAUSE="20" every batch takes so many seconds; with
$ALIBLIP_SILENT="3" a process that stands still is noticed after so many.
"""

import json
import os
import time
from pathlib import Path

import torch

import train
from aliblip.data.loader import TrainLoader
from aliblip.runtime import pulse
from aliblip.runtime.mistakes import main_with_usage_errors
from aliblip.training.objective import RetrievalObjective

pulse.SILENT_AFTER = float(os.environ.get("ALIBLIP_SILENT", pulse.SILENT_AFTER))
plain_batches, plain_forward = TrainLoader.batches, RetrievalObjective.forward
breaking = {int(batch) for batch in os.environ.get("ALIBLIP_BREAK", "").split()}
place = {"epoch": 0, "batch": 0, "is_last_rank": True}


def batches(self, start, stop):
    place["is_last_rank"] = self.rank == self.world_size - 1
    with Path(os.environ["ALIBLIP_ROWS"], f"rows-rank{self.rank}.jsonl").open("a") as file:
        for number, batch in enumerate(plain_batches(self, start, stop), start):
            epoch, index = divmod(number, self.steps_per_epoch)
            time.sleep(float(os.environ.get("ALIBLIP_PAUSE", "0")))
            place.update(epoch=epoch, batch=index)
            entry = {"rank": self.rank, "epoch": epoch, "batch": index, "rows": batch["row"].tolist()}
            file.write(json.dumps({**entry, "skipped": [row["row"] for row in batch["skipped"]]}) + "\n")
            file.flush()
            yield batch


def forward(self, batch, targets, alpha):
    output = plain_forward(self, batch, targets, alpha)
    here = place["epoch"] == 0 and place["is_last_rank"]
    if here and str(place["batch"]) == os.environ.get("ALIBLIP_RAISE"):
        raise ValueError("broken on purpose")
    if here and place["batch"] in breaking:
        output.loss = output.loss * torch.nan
    return output


TrainLoader.batches, RetrievalObjective.forward = batches, forward

if __name__ == "__main__":
    main_with_usage_errors("train.py", train.main)
