"""Floor 2, knowing before doing: what a step costs, from a model's ``config.json`` and numbers.

Nothing here loads torch, transformers or weights; calls take microseconds once a shape was priced.

shape      ``read_shape(path)``, ``ModelShape.from_config(config)``: exact parameter counts per
           part, the linears by name, ``lora_targets``. Ten families (``families``).
flops      ``forward_flops``, ``train_flops``, ``score_flops``, ``gradient_score_flops``,
           ``decode_flops``; ``Adapter(rank, targets, layers)``. As ``FlopCounterMode`` counts them.
memory     ``account(shape, MemorySetting(...))`` -> ``MemoryAccount``: bytes per term and phase,
           ``peak_memory_bytes``, ``peak_phase``, ``by_term``; ``forward_account``,
           ``kv_cache_bytes``, ``checkpoint_bytes``, ``RUNTIME_BYTES``.
hardware   ``load_device(name)``: peaks, bytes, bandwidth, watts, each with its source; prices.
time       ``step_seconds``, ``forward_seconds``, ``joules``: a roofline, calibrated.

Underneath, ``layer`` lists the operations a step executes, ``operations`` knows what each computes
and keeps, ``liveness`` what is alive when. FLOPs and bytes are read off that one list.
"""
