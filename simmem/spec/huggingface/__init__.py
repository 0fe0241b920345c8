"""Which decoder does a Hugging Face `config.json` describe, and what do its files hold?"""

from simmem.spec.huggingface.config import model_from_config

__all__ = ["model_from_config"]
