"""Rows, tokens, packs: from any files to what a model is scored and trained on.

``pool`` reads, ``tokens`` tokenises, ``store`` keeps both on disk in shards, ``splits`` divides,
``packing`` and ``packed_attention`` make sequences for training. Importing them loads no torch.
"""
