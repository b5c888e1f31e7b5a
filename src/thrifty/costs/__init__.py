"""Floor 2, knowing before doing: what a step costs, from a model's ``config.json`` and numbers.

Nothing here loads torch, transformers or weights; calls take microseconds once a shape was priced.

shape      ``read_shape(path)``, ``ModelShape.from_config(config)``: exact parameter counts per
           part, the linears by name, ``lora_targets``. How families spell it: ``families/``.
setting    ``MemorySetting``: one way to run a step, in plain numbers; ``Storage``, ``States``.
flops      ``step_flops``, ``forward_flops``, ``score_flops``, ``gradient_score_flops``,
           ``decode_flops``; ``Adapter(rank, targets, layers)``. As ``FlopCounterMode`` counts them.
memory     ``account(shape, setting)`` -> ``MemoryAccount``: bytes per term and phase of a step;
           ``peaks`` of many at once; ``forward_account``. ``job``: the phases of a whole job.
           ``allocator``: from allocated bytes to reserved and device memory.
hardware   ``load_device(name)``: peaks, bytes, bandwidth, links, watts, with sources; prices.
time       ``step_seconds``, ``forward_seconds``, ``joules``: a roofline, calibrated.

Underneath, ``layer`` lists the operations a step executes, ``operations`` knows what each computes
and keeps, ``liveness`` what is alive when. FLOPs, bytes and seconds are read off that one list.
"""
