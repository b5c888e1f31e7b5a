"""What a run did: as JSON (``summary``), as a page (``page``, ``figures``), in words (``words``).

Everything here only reads: the plan, the ledger and the files of a run folder.
"""
