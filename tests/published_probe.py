"""Uses a published model as a stranger would: started by test_publish.py with `python -I`, in a folder with two photos,
where our package can't be imported. Everything comes from HF_ENDPOINT.

    python -I published_probe.py NAME OUTPUT.pt
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from remote_code_probe import NotInstalled, scores


def main(name: str) -> dict:
    from huggingface_hub import hf_hub_download
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    card = Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8")
    printed = []
    for snippet in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(snippet, {})
        printed.append(out.getvalue())
    return {"module": type(model).__module__, "scores": scores(model, processor), "printed": printed}


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled)
    import torch

    torch.save(main(sys.argv[1]), sys.argv[2])
