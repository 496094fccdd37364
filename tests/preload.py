"""What the server of `tests.faulty` has imported before it forks."""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerFast

__all__ = ["AutoConfig", "AutoTokenizer", "BertForSequenceClassification", "PreTrainedTokenizerFast", "transformers"]
