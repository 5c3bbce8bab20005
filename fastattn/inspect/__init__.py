"""Looking inside: what attention attends to, on request, while everything else keeps its speed.

attention_weights   the weights of chosen heads and queries, from query and key
attention_summary   entropy, largest weight and distance of every query, without the (seq, seq) matrix; an op of the grid
record              both, from chosen layers of a whole model while it runs

`fastattn.plot` draws what they give.
"""

from ..ops.attention_summary import AttentionSummary, attention_summary
from .heads import HeadSummary
from .recorder import Recording, Seen, record
from .weights import attention_weights

__all__ = ["AttentionSummary", "HeadSummary", "Recording", "Seen", "attention_summary", "attention_weights", "record"]
