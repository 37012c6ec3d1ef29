"""Text to Megatron's ``.bin``/``.idx`` on datatrove, for ``tools/prepare_data.py``.

``sources`` finds the files, ``readers`` reads them strictly, ``step`` tokenises and writes a shard,
``execute`` hands tasks to datatrove's executors, ``rounds`` runs them until nothing is missing,
``manifest`` writes what describes the result, ``verify`` checks it. ``plan`` is what a run is,
``records`` what is finished of it.
"""
