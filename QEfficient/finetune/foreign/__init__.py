"""Configuration files of other fine-tuning tools, read as our options with the defaults of the tool they are of."""
