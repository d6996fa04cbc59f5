"""What there is to say of a trained run: bounds by several methods, in one table, with figures and files."""

from ppl_vae.verdicts.methods import METHODS, Asked, judge
from ppl_vae.verdicts.table import Row, Verdict

__all__ = ["METHODS", "Asked", "Row", "Verdict", "judge"]
