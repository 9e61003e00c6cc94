"""One module per model family, named as its ``model_type``. A miss lists what exists."""
