"""Text to Megatron's ``.bin``/``.idx`` on datatrove, for ``tools/prepare_data.py``.

``sources`` finds the files, ``readers`` reads them strictly, ``tokenise`` writes a shard,
``executors`` hands tasks to datatrove's executors, ``scheduler`` runs them until none is missing,
``merging`` makes few shards of many, ``manifest`` writes what describes the result, ``verify``
checks it, ``blending`` lists several results. ``recipe`` is what a run is,
``records`` what is finished of it.
"""
