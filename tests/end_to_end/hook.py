"""A person's own hook."""

from pathlib import Path

from k2train.train.hooks import Hook


class Phases(Hook):
    """Writes the phase of each step."""

    def start(self, trainer):
        self.path = Path(trainer.paths.root) / "phases.txt"
        self.seen = []

    def after_step(self, step, *, applied):
        self.seen.append(f"{step.phase.name} {applied}")

    def finish(self, *, failed):
        self.path.write_text("\n".join(self.seen))
