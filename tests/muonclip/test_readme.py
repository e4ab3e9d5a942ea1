"""The README's loop runs as printed and learns."""

import math
import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "optim" / "README.md"


def test_the_loop_of_the_readme_runs_and_learns(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        exec(compile(code, str(README), "exec"), names)
    losses, clip = names["losses"], names["optimizer"].qk_clip
    assert losses[0] > 0.9 * math.log(50)
    assert losses[-1] < 0.8 * losses[0]
    assert clip.max_logits.shape == clip.gamma.shape == (1, 4)
    assert clip.max_logits.isfinite().all()
    assert "tensor" in capsys.readouterr().out
