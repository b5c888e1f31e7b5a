"""What a decoder executes: embedding, one layer, and the head with its loss, in transformers 5.x.

One program for all families; the differences are switches of ``ModelShape``. Read from the
models' own ``forward`` and checked against what autograd saves. Attention is the default of
transformers: fused (sdpa) wherever the family supports it, otherwise eager (gemma2). With a mask
(packed documents, padding, a window shorter than the sequence) sdpa gets a 4-D mask, which it
converts to the model's dtype in every layer and keeps, and grouped keys and values are repeated to
all heads; without, it is causal by flag and keeps neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from thrifty.costs.latent import latent_projections
from thrifty.costs.mixture import mixture_of_experts
from thrifty.costs.mlp import mlp
from thrifty.costs.operations import (
    Adapter,
    Operation,
    Operations,
    Product,
    Program,
    Size,
    Tensor,
)
from thrifty.costs.rotary import rotate
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a step runs the model: what is trained, in which dtype, under which attention."""

    itemsize: int = 4
    adapter_itemsize: int = 4
    on_cpu: bool = True
    adapter: Adapter | None = None
    only_layers: frozenset[int] | None = None
    """Only the weights of these layers are trained; None: all, or the adapter."""
    with_embedding: bool = False
    """The embedding beside them."""
    with_head: bool = False
    """The final norm and the head beside them."""
    only_head: bool = False
    """Only the head's matrix is trained."""
    recompute: bool = False
    """Some layers are run again in the backward."""
    quantised: bool = False
    """The layers' linears are stored in few bits, and made whole for each use."""
    mlp_share: float = 0.0
    """Of the tokens, those whose MLP runs at a time, and again in the backward; 0: all, once."""
    backward: bool = True
    training: bool = True
    masked: bool = False
    eager: bool = False
    """Force eager attention."""
    window_masked: bool = False
    """Sliding-window layers get a mask, as their window is shorter than the sequence."""
    one_row: bool = False
    """The batch is a single row, which some kernels broadcast without a copy."""

    @property
    def trains_all(self) -> bool:
        chosen = self.adapter is not None or self.only_layers is not None or self.only_head
        return self.backward and not chosen

    def trains_embedding(self, shape: ModelShape) -> bool:
        """A head that is trained takes the embedding with it where they are tied."""
        tied = shape.tie_word_embeddings and (self.only_head or self.with_head)
        return self.trains_all or (self.backward and (self.with_embedding or tied))

    def trains_head(self, shape: ModelShape) -> bool:
        """With its norm."""
        tied = shape.tie_word_embeddings and self.with_embedding
        return self.trains_all or (self.backward and (self.with_head or tied))

    def embedding_grad(self, shape: ModelShape) -> bool:
        # transformers makes the embedding's output require a gradient under checkpointing, so that
        # the backward then runs through every layer whatever is frozen.
        return self.trains_embedding(shape) or (self.backward and self.recompute)

    @property
    def kernels(self) -> Setup:
        """What of it a piece depends on, told apart which of its tensors need a gradient."""
        return _kernels(self)


@lru_cache(maxsize=512)
def _kernels(setup: Setup) -> Setup:
    return Setup(
        itemsize=setup.itemsize,
        adapter_itemsize=setup.adapter_itemsize,
        on_cpu=setup.on_cpu,
        quantised=setup.quantised,
        mlp_share=setup.mlp_share,
        training=setup.training,
        eager=setup.eager,
        one_row=setup.one_row,
    )


@lru_cache(maxsize=512)
def embedding(shape: ModelShape, setup: Setup) -> Operations:
    """Token ids -> the first layer's input."""
    p = _program(shape, setup, trained=setup.trains_embedding(shape))
    ids = Tensor("ids", Size(8.0))
    grad = setup.embedding_grad(shape)
    width = Size(shape.embedding_size * p.itemsize)
    kept = (ids,) if p.trained else ()
    x = p.emit(
        "embedding",
        (ids,),
        width,
        grad=grad,
        saves=kept,
        weight_elements=shape.head_parameters,
        trained=p.trained,
    )
    if shape.scaled_embedding:
        x = p.apply("scale", x)
    if shape.projection_parameters:
        x = p.product(x, shape.embedding_size, shape.hidden_size, trained=p.trained)
    if shape.num_positions:
        positions = p.emit(
            "embedding",
            (Tensor("positions", Size(8.0)),),
            Size(shape.hidden_size * p.itemsize),
            grad=p.trained,
            saves=(Tensor("positions", Size(8.0)),) if p.trained else (),
            weight_elements=shape.num_positions * shape.hidden_size,
            trained=p.trained,
        )
        x = p.add(x, positions)
    p.dropout(x, shape.embedding_dropout)
    if grad and not p.trained:
        # What the embedding's module returns is made to require a gradient: a leaf, which the graph
        # holds. Where nothing follows it is what the first layer stores.
        leaf = p.operations[int(shape.scaled_embedding)]
        if leaf is not p.operations[-1]:
            p.operations[p.operations.index(leaf)] = replace(leaf, saves=(leaf.writes,))
    return Operations(p.operations)


def head(shape: ModelShape, setup: Setup, loss: bool = True) -> Operations:
    """The last layer's output -> logits, and the loss that ``ForCausalLMLoss`` takes in float32."""
    trained = setup.trains_head(shape)
    alone = setup.only_head or setup.only_layers == frozenset()
    grad = setup.backward and (setup.embedding_grad(shape) or not alone)
    matrix = trained or (setup.only_head and setup.backward)
    kernels = replace(setup.kernels, adapter_itemsize=setup.itemsize, quantised=False)
    kernels = replace(kernels, mlp_share=0.0)
    return _head(shape, kernels, trained, matrix, grad, loss)


@lru_cache(maxsize=512)
def _head(
    shape: ModelShape, setup: Setup, trained: bool, matrix: bool, grad: bool, loss: bool
) -> Operations:
    """``trained``: all of it; ``matrix``: the last one; ``grad``: its input needs a gradient."""
    p = _program(shape, setup, trained=trained)
    x = _input(shape, setup, grad=grad)
    if shape.final_norm:
        x = p.norm(x, shape.hidden_size)
    if shape.projection_parameters:
        x = p.product(x, shape.hidden_size, shape.embedding_size, trained=trained)
    logits = p.product(x, shape.embedding_size, shape.vocab_size, trained=matrix)
    if shape.logit_softcap:
        logits = p.apply("scale", logits)
        logits = p.apply("tanh", logits, keeps="output")
        logits = p.apply("scale", logits)
    if loss:
        wide = p.cast(logits, p.itemsize, 4)
        log_probabilities = p.apply("log_softmax", wide, keeps="output", passes=(2.0, 2.0))
        # The model's output holds the logits until the loss is returned.
        held = logits._replace(grad=False)
        p.emit("nll", (log_probabilities, held), Size(4.0), passes=(1.0, 1.0))
    return Operations(p.operations)


def layers(shape: ModelShape, setup: Setup) -> Iterator[Operations]:
    """The operations of each layer, first to last. Equal layers are the same object."""
    if setup.adapter is not None:
        setup.adapter.check(shape)
    adapted = _adapted(shape, setup)
    grad = setup.embedding_grad(shape)
    sliding, kernels = _sliding(shape), setup.kernels
    known: dict[tuple[bool, ...], Operations] = {}
    for index in range(shape.num_layers):
        trained = setup.trains_all or (setup.backward and index in (setup.only_layers or ()))
        adapter = setup.adapter if index in adapted else None
        masked = setup.masked or (setup.window_masked and sliding[index])
        rotates, mixture = index not in shape.no_rope_layers, shape.is_mixture(index)
        key = trained, adapter is not None, grad, masked, rotates, mixture
        if key not in known:
            known[key] = layer(shape, kernels, trained, adapter, grad, masked, rotates, mixture)
        yield known[key]
        grad = grad or trained or adapter is not None


def _adapted(shape: ModelShape, setup: Setup) -> frozenset[int]:
    if setup.adapter is None or not setup.backward:
        return frozenset()
    chosen = setup.adapter.layers
    return frozenset(range(shape.num_layers) if chosen is None else chosen)


def _sliding(shape: ModelShape) -> list[bool]:
    """Which layers slide. Only their number is known, and only it matters: spread evenly."""
    num, layers = shape.num_sliding_layers, shape.num_layers
    return [(index + 1) * num // layers > index * num // layers for index in range(layers)]


@lru_cache(maxsize=2048)
def layer(
    shape: ModelShape,
    setup: Setup,
    trained: bool,
    adapter: Adapter | None,
    grad: bool,
    masked: bool,
    rotates: bool,
    mixture: bool,
) -> Operations:
    """One decoder layer; ``grad``: its input needs a gradient; ``mixture``: it has experts."""
    p = _program(shape, setup, trained=trained, adapter=adapter, masked=masked, rotates=rotates)
    x, hidden = _input(shape, setup, grad=grad), shape.hidden_size
    if shape.block == "parallel":
        attended = p.dropout(_attention(p, p.norm(x, hidden), setup.eager), shape.dropout)
        branch = p.dropout(mlp(p, p.norm(x, hidden)), shape.dropout)
        p.add(x, p.add(attended, branch))
    elif shape.block == "shared":
        normal = p.norm(x, hidden)
        attended = p.dropout(_attention(p, normal, setup.eager), shape.dropout)
        p.add(x, p.add(attended, p.dropout(mlp(p, normal), shape.dropout)))
    elif shape.block == "sandwich":
        x = p.add(x, p.norm(_attention(p, p.norm(x, hidden), setup.eager), hidden))
        p.add(x, p.norm(mlp(p, p.norm(x, hidden)), hidden))
    elif shape.block == "branch":
        x = p.add(x, p.norm(_attention(p, x, setup.eager), hidden))
        p.add(x, p.norm(mlp(p, x), hidden))
    elif shape.block == "post":
        attended = p.dropout(_attention(p, x, setup.eager), shape.dropout)
        x = p.norm(p.add(x, attended), hidden)
        p.norm(p.add(x, p.dropout(mlp(p, x), shape.dropout)), hidden)
    else:
        attended = p.dropout(_attention(p, p.norm(x, hidden), setup.eager), shape.dropout)
        x = p.add(x, attended)
        run = mixture_of_experts if mixture else mlp
        p.add(x, p.dropout(run(p, p.norm(x, hidden)), shape.dropout))
        if shape.model_type == "gpt2":  # a variable of its own
            p.hold(attended)
    return Operations(p.operations)


def _program(
    shape: ModelShape,
    setup: Setup,
    *,
    trained: bool,
    adapter: Adapter | None = None,
    masked: bool = False,
    rotates: bool = True,
) -> Program:
    return Program(
        shape=shape,
        itemsize=setup.itemsize,
        adapter_itemsize=setup.adapter_itemsize,
        on_cpu=setup.on_cpu,
        trained=trained,
        adapter=adapter,
        masked=masked,
        rotates=rotates,
        training=setup.training,
        quantised=setup.quantised,
        mlp_share=setup.mlp_share,
        one_row=setup.one_row,
        operations=[],
    )


def _input(shape: ModelShape, setup: Setup, *, grad: bool) -> Tensor:
    return Tensor("input", Size(shape.hidden_size * setup.itemsize), grad)


def _attention(p: Program, x: Tensor, force_eager: bool) -> Tensor:
    shape = p.shape
    *projections, out = (linear for linear in shape.linears if linear.part == "attention")
    if shape.latent:
        q, k, v, held = latent_projections(p, shape.latent, projections, x)
        result = p.linear(out, _attended(p, q, k, v, force_eager))
        p.hold(x, q, k, v, *held)
        return result
    query_bytes = Size(shape.query_size * p.itemsize)
    key_bytes = Size(shape.key_value_size * p.itemsize)
    fused = len(projections) == 1
    # With one product for q, k and v the three are views of the same buffer.
    q, k, v = [p.linear(projections[0], x)] * 3 if fused else [p.linear(y, x) for y in projections]
    parts = (q,) if shape.splits else ()
    if shape.splits:
        k, v = p.emit("copy", (k,), key_bytes), p.emit("copy", (v,), key_bytes)
    if shape.splits == "copies":
        q = p.emit("copy", (q,), query_bytes)
    if shape.model_type == "opt":
        q = p.apply("scale", q)
    if shape.clips:  # in place, for which autograd keeps a copy of what was there
        q, k, v = (p.apply("clip", x, keeps="input") for x in (q, k, v))
    if shape.qk_norm in ("head", "all"):
        whole = shape.qk_norm == "all"
        q = p.norm(q, shape.query_size if whole else shape.head_dim)
        k = p.norm(k, shape.key_value_size if whole else shape.head_dim)
    if shape.rotary_dim and p.rotates:
        q, k = rotate(p, q, query_bytes), rotate(p, k, key_bytes)
        if shape.qk_norm == "unit":
            q, k = (p.norm(each, shape.head_dim, weighed=False) for each in (q, k))
    elif shape.tempered:  # by float32 numbers, one a position
        q = p.cast(p.apply("scale", p.cast(q, p.itemsize, 4)), 4, p.itemsize)
    halves = fused and shape.model_type != "falcon"  # which rotates whole heads
    result = p.linear(out, _attended(p, q, k, v, force_eager, halves))
    p.hold(x, *parts, q, k, v)  # local variables of the attention's forward
    return result


def _attended(
    p: Program, q: Tensor, k: Tensor, v: Tensor, force_eager: bool, halves: bool = False
) -> Tensor:
    shape = p.shape
    out = Size(shape.num_attention_heads * shape.value_dim * p.itemsize)
    eager = force_eager or shape.attention == "eager"
    # A CPU has no fused kernel for dropout, nor for values narrower than the keys.
    drops = shape.attention_dropout > 0 and p.training
    without = p.on_cpu and (drops or shape.value_dim != shape.head_dim)
    if eager or shape.attention == "math" or without:
        return _plain_attention(p, q, k, v, out, eager)
    attended = _fused_attention(p, q, k, v, out)
    # Concatenated rotary halves leave heads first; then the output is copied to tokens first.
    if shape.rotary_dim and (halves or shape.rotary_dim < shape.head_dim):
        attended = p.apply("copy", attended)
    return attended


def _attention_products(p: Program) -> tuple[Product, Product]:
    """Queries x keys, and weights x values."""
    heads = p.shape.num_attention_heads
    return Product(p.shape.head_dim, 1, heads), Product(p.shape.value_dim, 1, heads)


def _fused_attention(p: Program, q: Tensor, k: Tensor, v: Tensor, out: Size) -> Tensor:
    shape = p.shape
    extra: tuple[Tensor, ...] = ()
    if p.masked and shape.mask == "positions":
        mask = p.emit("mask", (), Size(0.0, p.itemsize), grad=False)
        extra = (mask,)
        # A single key-value head is broadcast without a copy.
        if shape.num_attention_heads > shape.num_key_value_heads > 1:
            k, v = p.emit("copy", (k,), out), p.emit("copy", (v,), out)
    grad = q.grad or k.grad or v.grad
    result = Tensor(p.name(), out, grad)
    logsumexp = Tensor(f"{p.name()} logsumexp", Size(4.0 * shape.num_attention_heads))
    kept = (q, k, v, result, logsumexp, *extra) if grad else ()
    scores, attend = _attention_products(p)
    p.operations.append(
        Operation(
            "sdpa",
            (q, k, v, *extra),
            result,
            kept,
            "after" if grad else "",
            forward=(scores, attend),
            # One kernel makes dq, dk and dv, whichever are needed, from the scores computed again.
            backward=(scores,) * 3 + (attend,) * 2 if grad else (),
        )
    )
    return result


def _plain_attention(p: Program, q: Tensor, k: Tensor, v: Tensor, out: Size, eager: bool) -> Tensor:
    """Attention maps in memory: eager, or sdpa's reference kernel, which a CPU takes for dropout.

    The products run on contiguous copies of q, k and v with all heads.
    """
    shape, heads = p.shape, p.shape.num_attention_heads
    # The reference kernel computes in float32 throughout, eager only its softmax.
    itemsize = p.itemsize if eager else 4
    whole = out.times(itemsize / p.itemsize)
    wide = Size(float(shape.query_size * itemsize))
    q2 = p.emit("copy", (q,), wide)
    if p.one_row and shape.num_key_value_heads == 1:  # all heads' products read the same one
        single = Size(float(shape.key_value_size * itemsize))
        k2, v2 = p.emit("copy", (k,), single), p.emit("copy", (v,), single)
    else:
        k2, v2 = p.emit("copy", (k,), wide), p.emit("copy", (v,), whole)
    queried, weighed = ((product,) for product in _attention_products(p))
    kept = ((k2,) if q.grad else ()) + ((q2,) if k.grad else ())
    scores = p.emit(
        "scores", (q2, k2), Size(0.0, heads * itemsize), saves=kept,
        packs="before" if kept else "", forward=queried, backward=queried * (q.grad + k.grad),
        passes=(0.0, 0.0),
    )  # fmt: skip
    if eager:
        scores = p.apply("scale", scores)
        if shape.attention_softcap:
            scores = p.apply("scale", scores)
            scores = p.apply("tanh", scores, keeps="output")
            scores = p.apply("scale", scores)
    scores = p.apply("mask", scores)
    if shape.sinks:
        weights = _softmax_with_sinks(p, scores)
    else:
        wide_scores = p.cast(scores, itemsize, 4)
        weights = p.apply("softmax", wide_scores, keeps="output", passes=(2.0, 2.0))
        weights = p.cast(weights, 4, itemsize)
    if eager:
        p.hold(scores)
    if shape.attention_dropout and p.training:
        weights = p.dropout(weights, shape.attention_dropout)
    kept = ((v2,) if weights.grad else ()) + ((weights,) if v.grad else ())
    attended = p.emit(
        "attend", (weights, v2), whole, saves=kept, packs="before" if kept else "",
        forward=weighed, backward=weighed * (weights.grad + v.grad), passes=(0.0, 0.0),
    )  # fmt: skip
    attended = p.apply("copy", attended)
    return p.cast(attended, itemsize, p.itemsize)


def _softmax_with_sinks(p: Program, scores: Tensor) -> Tensor:
    """In the model's dtype, over the scores and a column more; the weights are a view of it."""
    column = float(p.shape.num_attention_heads * p.itemsize)
    grad = scores.grad or p.trained
    joined = p.emit("concatenate", (scores,), Size(column, column), grad=grad)
    places = Tensor(f"{p.name()} places", Size(8.0 * p.shape.num_attention_heads))
    most = p.emit("max", (joined,), Size(column), saves=(places,) if grad else ())
    return p.apply("softmax", p.add(joined, most), keeps="output", passes=(2.0, 2.0))
