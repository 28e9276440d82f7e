"""``python -m QEfficient.cloud.<name>``: efficient-transformers' command lines over the code of ``qefficient``."""
