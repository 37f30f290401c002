"""The engine: candidates in, per-scale log-likelihoods out, no piece of work done twice.

`open` lists (image, class) rows, `advance` scores them up to a scale, `keep` drops rows, `fork` adds perturbed
samples that share their pages with the clean one as far as their tokens agree. Stages continue: keys and values of
scored scales stay in pages, so a later stage reads them and starts where the earlier one stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from varlik import ops
from varlik.models.var import VAR
from varlik.models.weights import digest
from varlik.scoring.candidates import PER_ROW, Candidates, agreeing_scales
from varlik.scoring.class_tables import ClassTables
from varlik.scoring.graphs import bucket
from varlik.scoring.kv_cache import NO_PAGE, PagedCache
from varlik.scoring.memory import Budget, let_malloc_keep_memory
from varlik.scoring.options import Compute, EngineOptions
from varlik.scoring.packed_weights import pack
from varlik.scoring.passes import Passes
from varlik.tokens import TokenMaps

NO_ROW = -1

Method = TypeVar("Method", bound=Callable[..., Any])


def _undisturbed(method: Method) -> Method:
    """Run a method outside the caller's inference mode and autocast: pages outlive the call, scores must not differ."""

    @functools.wraps(method)
    def call(self, *args, **options):
        device = self.weights.positions.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            return method(self, *args, **options)

    return cast(Method, call)


def _version(var: VAR) -> int:
    """Grows with every change of the weights in place."""
    return sum(0 if parameter.is_inference() else parameter._version for parameter in var.parameters())


class Engine:
    """Likelihoods of many classes of many images, from one model.

    Raises `ValueError` for candidates of another engine, classes that were not prepared, and scales that go backwards;
    `RuntimeError` once the weights it was made from have been changed in place, as by training.
    """

    def __init__(self, var: VAR, options: EngineOptions | None = None):
        """`options.max_memory` bounds pages and the chunk at work, and tables come on top.

        Rows whose pages find no room are scored without keeping them; one row at a time is always scored. Raises
        `ValueError` for weights in half precision and for options that the device cannot serve.
        """
        options = options or EngineOptions()
        compute = options.compute(var.pos_start.device, var.pos_start.dtype)
        with torch.inference_mode(False), torch.no_grad():
            self._build(var, compute, options.max_memory)

    @functools.cached_property
    def weights_digest(self) -> str:
        """Stands for the transformer's weights, see `varlik.models.weights.digest`."""
        return digest(self._var)

    def _build(self, var: VAR, compute: Compute, max_memory: int | None) -> None:
        self._var, self.config, self.compute = var, var.config, compute
        self._version = _version(var)
        self.weights = pack(var, compute)
        self.tables = ClassTables(var, self.weights)
        dtype, device = compute.dtype, self.weights.positions.device
        self._budget = Budget.of(device, max_memory)
        per_slot = 2 * self.config.depth * self.config.embed_dim * dtype.itemsize
        self.cache = PagedCache(
            self.config.depth,
            self.config.num_heads,
            self.config.head_dim,
            tuple(p * p for p in self.config.patch_nums),
            max_slots=self._budget.pages // per_slot + self.config.num_classes + 1,
            dtype=dtype,
            device=device,
        )
        self._class_pages = torch.empty(0, dtype=torch.int64, device=device)
        self._sizes = torch.tensor([p * p for p in self.config.patch_nums], device=device)
        self.passes = Passes(self.weights, self.tables, self.cache)
        if self.passes.side_by_side:
            let_malloc_keep_memory()

    @property
    def chunk_bytes(self) -> int:
        """Memory that the rows at work may take."""
        return self._budget.chunk

    @_undisturbed
    def prepare(self, labels: Tensor) -> None:
        """Build the class tables of `labels` (n,) that are missing."""
        self._check_weights()
        self.tables.extend(labels)
        # Of all rows that have no page yet, whatever may have come between the two.
        first = len(self._class_pages)
        if first < len(self.tables):
            pages = self.cache.allocate(range(1), len(self.tables) - first, beyond_limit=True)[:, 0]
            for layer in range(self.config.depth):
                self.cache.arenas[layer][pages] = self.tables.pages[layer][first:]
            self._class_pages = torch.cat((self._class_pages, pages))

    @_undisturbed
    def warmup(self, rows: int = 1, autotune: bool = False) -> None:
        """Compile, build and capture what scoring `rows` rows takes, by scoring an image of zeros.

        It is scored scale by scale and in one go; passes over other runs of scales are captured when first run. With
        `autotune`, kernels time their numbers of warps and pipeline stages meanwhile, which stay for the process.
        Raises `ValueError` for less than one row, and for `autotune` without Triton's path or with `deterministic`.
        """
        if rows < 1:
            raise ValueError(f"rows: expected 1 or more, got {rows}")
        if autotune and self.compute.impl != "triton":
            raise ValueError("autotune: there are no kernels to tune on torch's path")
        if autotune and self.compute.deterministic:
            raise ValueError("autotune: other numbers of warps change the last bits; not with deterministic")
        config, device = self.config, self.weights.positions.device
        self.prepare(torch.arange(config.num_classes, device=device))
        tokens = torch.zeros(1, config.num_tokens, dtype=torch.int64, device=device)
        inputs = torch.zeros(1, config.num_tokens - 1, config.codebook_dim, device=device)
        features = torch.zeros(1, config.codebook_dim, config.patch_nums[-1], config.patch_nums[-1], device=device)
        image = TokenMaps(tokens, inputs, features, (0,), config.patch_nums)
        labels = torch.arange(rows, device=device).remainder(config.num_classes).unsqueeze(0)
        # Room for all that follows, for captured passes find keys by their address.
        room = self.cache.allocate(range(1, config.num_scales), bucket(rows) + rows, beyond_limit=True)
        self.cache.release(room)
        with ops.autotuning() if autotune else nullcontext():
            for steps in (range(2, config.num_scales + 1), (config.num_scales,)):
                candidates = self.open(image, labels)
                for scale in steps:
                    self.advance(candidates, scale)
                self.close(candidates)

    @_undisturbed
    def open(self, images: TokenMaps, labels: Tensor, per_token: bool = False, shared_prefix: int = 0) -> Candidates:
        """Rows of every class of `labels` (B, N) for each image, scored at scale 1 (a look-up); -1 stands for no row.

        `shared_prefix=j` is an approximation, off by default: all classes of an image read one set of keys and values
        at scales 1..j, those of the null class, and only scales j + 1 and later are scored (the others count 0).

        Raises `ValueError` for labels of another shape, classes that were not prepared, token maps of another model,
        inputs that require grad and a prefix that leaves no scale; `MemoryError` when the pages of a shared prefix find
        no room.
        """
        self._check_weights()
        if labels.dim() != 2 or len(labels) != len(images):
            raise ValueError(f"labels: expected ({len(images)}, N), got {tuple(labels.shape)}")
        self.check_images(images)
        image, place = (labels != NO_ROW).nonzero(as_tuple=True)
        clean, label = torch.zeros_like(image), labels[image, place]
        rows = self._rows(image, clean, label, image, images.tokens, images.teacher_forcing_input, per_token)
        if shared_prefix:
            self._share_null_prefix(rows, images, shared_prefix)
        return rows

    @_undisturbed
    def advance(self, candidates: Candidates, to_scale: int, retain: int | None = None) -> Candidates:
        """Score every row up to and including scale `to_scale`, in place.

        Keys and values of the first `retain` scales (default: all that finer scales read) are kept for a later stage,
        as far as memory allows; without them it has to work them out again.

        Raises `ValueError` for rows of another engine and for a scale beyond the model's or before what a row has
        scored.
        """
        self._check(candidates)
        if not 1 <= to_scale <= self.config.num_scales:
            raise ValueError(f"to_scale: expected 1 to {self.config.num_scales}, got {to_scale}")
        if len(candidates) and to_scale < int(candidates.scored.max()):
            raise ValueError(f"to_scale: {to_scale} lies before scale {int(candidates.scored.max())}, which is scored")
        todo = (candidates.scored < to_scale).nonzero().flatten()
        reached = candidates.cached[todo]
        for cached in reached.unique().tolist():
            group = todo[reached == cached]
            layers = 1 if self.passes.side_by_side else self.config.depth
            itemsize = self.compute.dtype.itemsize
            size = self._budget.chunk_rows(self.config, cached, to_scale, layers, itemsize, reached.device)
            start = 0
            while start < len(group):
                chunks = -(-(len(group) - start) // size)  # as many as it takes, all of nearly the same size
                rows = group[start : start + -(-(len(group) - start) // chunks)]
                try:
                    self._advance_chunk(candidates, rows, cached, to_scale, retain)
                    start += len(rows)
                    continue
                except torch.cuda.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                size = len(rows) // 2
                self.passes.forget()
                torch.cuda.empty_cache()  # here, where the error no longer holds the tensors of the chunk
        return candidates

    @_undisturbed
    def keep(self, candidates: Candidates, rows: Tensor) -> Candidates:
        """The rows (n,) of `candidates`, which is used up; the pages of all other rows become free.

        Raises `ValueError` for a row named twice.
        """
        self._check(candidates)
        dropped = torch.ones(len(candidates), dtype=torch.bool, device=rows.device)
        dropped[rows] = False
        if int(dropped.sum()) != len(candidates) - len(rows):
            raise ValueError("rows: expected every row at most once")
        kept: dict[str, Any] = {name: getattr(candidates, name)[rows] for name in PER_ROW}
        per_token = None if candidates.token_log_prob is None else candidates.token_log_prob[rows]
        left = replace(candidates, token_log_prob=per_token, **kept)
        self.cache.release(candidates.pages[dropped, 1:])
        candidates.engine = None
        return left

    @_undisturbed
    def fork(self, candidates: Candidates, images: TokenMaps, sample: int) -> Candidates:
        """`candidates` and, for each of its clean rows, one of sample `sample`, whose token maps are `images` (all B).

        Scores and pages are shared up to the last scale in which all tokens so far equal the clean ones. `candidates`
        is used up. Raises `ValueError` for sample 0 or one that is there already, for fewer images than there are, for
        images that `open` refuses, and for rows with a shared prefix, whose pages are no sample's own.
        """
        self._check(candidates)
        self.check_images(images)
        if candidates.shared_prefix:
            raise ValueError("candidates: rows with a shared prefix cannot be forked")
        if len(candidates) and len(images) <= int(candidates.image.max()):
            raise ValueError(f"images: expected all {int(candidates.image.max()) + 1} or more, got {len(images)}")
        if sample < 1 or (candidates.sample == sample).any():
            raise ValueError(f"sample: expected a new sample from 1 on, got {sample}")
        clean = (candidates.sample == 0).nonzero().flatten()
        image, label = candidates.image[clean], candidates.label[clean]
        new = self._rows(
            image,
            torch.full_like(image, sample),
            label,
            image + len(candidates.tokens),
            torch.cat((candidates.tokens, images.tokens)),
            torch.cat((candidates.inputs, images.teacher_forcing_input.to(candidates.inputs.dtype))),
            candidates.token_log_prob is not None,
        )
        agreeing = agreeing_scales(self.config, candidates.tokens[candidates.source[clean]], new.tokens[new.source])
        self._share_prefix(candidates, clean, new, agreeing)
        merged: dict[str, Any] = {name: torch.cat((getattr(candidates, name), getattr(new, name))) for name in PER_ROW}
        per_token = None
        if candidates.token_log_prob is not None and new.token_log_prob is not None:
            per_token = torch.cat((candidates.token_log_prob, new.token_log_prob))
        candidates.engine = None
        return replace(new, token_log_prob=per_token, **merged)

    @_undisturbed
    def close(self, candidates: Candidates) -> None:
        """Free the pages of all rows of `candidates`, which is used up."""
        self._check(candidates)
        candidates.engine = None
        self.cache.release(candidates.pages[:, 1:])

    def _check(self, candidates: Candidates) -> None:
        if candidates.engine is None:
            raise ValueError("candidates: used up by keep, fork or close; go on with what that returned")
        if candidates.engine is not self:
            raise ValueError("candidates: rows of another engine")

    def _check_weights(self) -> None:
        # Packed weights and class tables are of what the weights were, others share their memory: scores of neither.
        if _version(self._var) != self._version:
            raise RuntimeError(
                "the weights have changed since this engine was made from them: make a new engine or classifier, or "
                "call refresh() of what varlik.accelerate returned"
            )

    def check_images(self, images: TokenMaps) -> None:
        """Raise `ValueError` for token maps of another model and for inputs that require grad."""
        if images.patch_nums != self.config.patch_nums:
            raise ValueError(f"images: token maps of another model, with scales {images.patch_nums}")
        if images.teacher_forcing_input.requires_grad:
            raise ValueError("images: the engine takes no inputs that require grad; use the transformer itself")

    def _rows(self, image, sample, label, source, tokens, inputs, per_token: bool) -> Candidates:
        table_rows = self.tables.rows(label)
        count, config = len(label), self.config
        first = self.tables.first_log_prob[table_rows, tokens[source, 0]]
        log_likelihood = torch.full((count, config.num_scales), torch.nan, dtype=torch.float32, device=label.device)
        log_likelihood[:, 0] = first
        token_log_prob = None
        if per_token:
            token_log_prob = torch.full((count, config.num_tokens), torch.nan, dtype=torch.float32, device=label.device)
            token_log_prob[:, 0] = first
        pages = torch.full((count, config.num_scales), NO_PAGE, device=label.device)
        pages[:, 0] = self._class_pages[table_rows]
        ones = torch.ones_like(label)
        return Candidates(
            engine=self,
            image=image,
            sample=sample,
            label=label,
            source=source,
            log_likelihood=log_likelihood,
            token_log_prob=token_log_prob,
            scored=ones,
            cached=ones.clone(),
            pages=pages,
            evaluated=torch.zeros_like(pages),
            tokens=tokens,
            inputs=inputs.to(self.weights.positions.dtype),
        )

    def _advance_chunk(
        self, candidates: Candidates, rows: Tensor, cached: int, to_scale: int, retain: int | None
    ) -> None:
        """Score `rows` (n,), all of which have pages for exactly `cached` scales."""
        # Keys of the last scale are read by no other scale.
        kept = min(to_scale, self.config.num_scales - 1, to_scale if retain is None else retain)
        if kept <= cached or self.cache.room(range(cached, kept)) < len(rows):
            kept = cached
        # What need not be kept takes pages only where kernels attend to keys in the arenas.
        paged = kept if self.passes.side_by_side else to_scale
        pages = candidates.pages[rows, :paged]
        pages[:, cached:] = NO_PAGE
        try:
            pages[:, cached:kept] = self.cache.allocate(range(cached, kept), len(rows))
            pages[:, kept:] = self.cache.allocate(range(kept, paged), len(rows), beyond_limit=True)
            row_class = self.tables.rows(candidates.label[rows])
            tokens, inputs, source = candidates.tokens, candidates.inputs, candidates.source[rows]
            log_prob, scores = self.passes.run(tokens, inputs, source, row_class, pages, cached, to_scale)
        except BaseException:
            self.cache.release(pages[:, cached:])
            raise
        self.cache.release(pages[:, kept:])
        candidates.log_likelihood[rows, cached:to_scale] = scores.float()
        if candidates.token_log_prob is not None:
            boundaries = self.config.boundaries
            candidates.token_log_prob[rows, boundaries[cached] : boundaries[to_scale]] = log_prob.float()
        candidates.evaluated[rows, cached:to_scale] += self._sizes[cached:to_scale]
        candidates.pages[rows, :kept] = pages[:, :kept]
        candidates.cached[rows] = kept
        candidates.scored[rows] = to_scale

    def _share_prefix(self, candidates: Candidates, clean: Tensor, new: Candidates, agreeing: Tensor) -> None:
        """Let each row of `new` hold the pages and scores of its clean row, as far as it has them and scales agree."""
        new.cached = torch.minimum(agreeing, candidates.cached[clean]).clamp(min=1)
        new.scored = torch.minimum(agreeing, candidates.scored[clean]).clamp(min=1)
        scales = torch.arange(self.config.num_scales, device=agreeing.device)
        new.pages = torch.where(scales < new.cached.unsqueeze(1), candidates.pages[clean], new.pages)
        self.cache.share(new.pages[:, 1:])
        shared = scales < new.scored.unsqueeze(1)
        new.log_likelihood = torch.where(shared, candidates.log_likelihood[clean], new.log_likelihood)
        # The first token may differ though the page, which the class alone decides, is shared: look it up.
        first = new.tokens[new.source, 0]
        new.log_likelihood[:, 0] = self.tables.first_log_prob[self.tables.rows(new.label), first]
        if new.token_log_prob is not None and candidates.token_log_prob is not None:
            ends = torch.tensor(self.config.boundaries[1:], device=agreeing.device)[new.scored - 1]
            tokens = torch.arange(self.config.num_tokens, device=agreeing.device) < ends.unsqueeze(1)
            new.token_log_prob = torch.where(tokens, candidates.token_log_prob[clean], new.token_log_prob)
            new.token_log_prob[:, 0] = new.log_likelihood[:, 0]

    def _share_null_prefix(self, rows: Candidates, images: TokenMaps, prefix: int) -> None:
        """Let all rows of an image hold the null class's pages of scales 1..`prefix`."""
        if not 1 <= prefix < self.config.num_scales:
            raise ValueError(f"shared_prefix: expected 0 to {self.config.num_scales - 1}, got {prefix}")
        rows.shared_prefix = prefix
        if not len(rows):
            return
        null = torch.full((len(images), 1), self.config.null_class, device=rows.label.device)
        self.prepare(null[:1, 0])
        owner = self.open(images, null)
        try:
            self.advance(owner, prefix)
            if int(owner.cached.min()) < prefix:
                raise MemoryError(f"shared_prefix: no room for the pages of {prefix} scales of {len(images)} images")
            self._read_pages_of(owner, rows, prefix)
        finally:
            self.close(owner)

    def _read_pages_of(self, owner: Candidates, rows: Candidates, prefix: int) -> None:
        """Let `rows` hold the first `prefix` pages of their image's row in `owner`, in place of scores of their own."""
        rows.pages[:, :prefix] = owner.pages[rows.image, :prefix]
        self.cache.share(rows.pages[:, 1:prefix])
        rows.log_likelihood[:, :prefix] = 0
        if rows.token_log_prob is not None:
            rows.token_log_prob[:, : self.config.boundaries[prefix]] = 0
        rows.scored.fill_(prefix)
        rows.cached.fill_(prefix)
        first_of_image = torch.ones_like(rows.image, dtype=torch.bool)
        first_of_image[1:] = rows.image[1:] != rows.image[:-1]
        rows.evaluated[first_of_image] = owner.evaluated[rows.image[first_of_image]]
