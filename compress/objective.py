"""What a student minimises: SLMRec's terms, each by its name, with a frozen teacher or one that learns as well."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from compress.blocks import block_ends, state_index
from compress.losses import direction_loss, divergence_loss, magnitude_loss
from slmrec.compress_config import DistillConfig
from slmrec.models.decoder import DecoderModel
from slmrec.samples import cross_entropy, rows_of, target_rows, targets_of
from slmrec.train import Batch

Targets = Int64[Tensor, " targets"]
BlockFeatures = Float[Tensor, "feature_targets blocks hidden"]
ReadStates = Mapping[int, Tensor]
"""Last layer of a block -> its states at the targets, [targets, hidden]."""


class DistillObjective(nn.Module):
    """Cross-entropy, feature direction, feature magnitude, multiple supervision and the teacher's list.

    Args:
        student: what is trained.
        config: weights of the terms; those of weight 0 are not computed.
        teacher_hidden: width of the features that come with a batch; where it is not the student's, a projection per
            block is trained with the student and dropped when it is saved.
    """

    def __init__(self, student: DecoderModel, config: DistillConfig, teacher_hidden: int | None = None) -> None:
        super().__init__()
        self.student, self.config = student, config
        self.ends = block_ends(student.num_layers, config.num_blocks)
        self.adapters = supervision_adapters(student, config)
        wider = teacher_hidden not in (None, student.hidden_size) and config.matches_features
        self.projections = nn.ModuleList(
            nn.Linear(student.hidden_size, teacher_hidden, bias=False) if wider and teacher_hidden else nn.Identity()
            for _ in self.ends
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms: ce, and per block direction_block_i, magnitude_block_i, supervision_block_i; and list.

        Features come with the batch, one row per feature target (see `feature_targets`).
        """
        read = read_states(self.student, self.ends, batch)
        return self.terms(read, self.heads(read), batch, batch.features)

    def heads(self, read: ReadStates) -> list[Tensor]:
        """Scores of the catalogue after each block that has an adapter, and the student's own last."""
        return head_logits(self.student, self.adapters, read)

    def terms(
        self, read: ReadStates, heads: list[Tensor], batch: Batch, features: BlockFeatures | None
    ) -> dict[str, Tensor]:
        """The terms of a student's states and scores; `features` may carry a gradient to their teacher."""
        targets, config = targets_of(batch), self.config
        terms = {"ce": cross_entropy(heads[-1], targets)}
        if config.matches_features:
            terms |= self._feature_terms(read, batch, features)
        share = 1 / max(1, len(self.adapters)) if config.loss == "paper" else 1.0
        for block, logits in enumerate(heads[:-1], 1):
            terms[f"supervision_block_{block}"] = config.supervision_weight * share * cross_entropy(logits, targets)
        if config.list_weight:
            assert batch.best is not None
            assert batch.best_scores is not None
            ours = heads[-1].gather(1, batch.best.long() - 1)
            terms["list"] = config.list_weight * divergence_loss(ours, batch.best_scores)
        return terms

    def _feature_terms(self, read: ReadStates, batch: Batch, features: BlockFeatures | None) -> dict[str, Tensor]:
        """Means over all targets, to which those without a comparable feature add nothing."""
        assert features is not None
        config, terms = self.config, {}
        is_kept = feature_targets(batch, has_prefix=self.student.spec.prefix_length > 0)
        count, kept = len(is_kept), is_kept.nonzero()[:, 0]
        share = (1 / config.num_blocks if config.loss == "paper" else 1.0) * len(features) / count
        features, norms = features.float(), batch.feature_norms
        if norms is None:
            norms = features.detach().pow(2).sum(dim=(0, 2)) / count
        for block, end in enumerate(self.ends):
            ours = self.projections[block](read[end].index_select(0, kept).float())
            theirs = features[:, block]
            if config.direction_weight:
                loss = direction_loss(ours, theirs) if len(ours) else ours.sum()
                terms[f"direction_block_{block + 1}"] = config.direction_weight * share * loss
            if config.magnitude_weight:
                norm = norms[block] if config.magnitude_scale == "hidden" else None
                squared = config.loss == "paper"
                loss = magnitude_loss(ours, theirs, norm=norm, squared=squared) if len(ours) else ours.sum()
                terms[f"magnitude_block_{block + 1}"] = config.magnitude_weight * share * loss
        return terms


class OnlineObjective(nn.Module):
    """Teacher and student learn together: cross-entropy for both, and the student follows the teacher as it is.

    The teacher's terms bear the prefix teacher_; its own supervision trains the adapters that logits are read from.
    """

    def __init__(self, teacher: DecoderModel, distillation: DistillObjective) -> None:
        super().__init__()
        assert distillation.config.online is not None
        self.teacher, self.distillation, self.online = teacher, distillation, distillation.config.online
        self.ends = block_ends(teacher.num_layers, distillation.config.num_blocks)
        needed = self.online.signal == "logits"
        self.teacher_adapters = supervision_adapters(teacher, distillation.config) if needed else nn.ModuleList()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The student's terms as `DistillObjective` names them, those of the teacher, and logits_block_i."""
        distillation = self.distillation
        theirs = read_states(self.teacher, self.ends, batch)
        ours = read_states(distillation.student, distillation.ends, batch)
        kept = feature_targets(batch, has_prefix=self.teacher.spec.prefix_length > 0).nonzero()[:, 0]
        features = torch.stack([theirs[end].index_select(0, kept) for end in self.ends], dim=1)
        heads = distillation.heads(ours)
        terms = distillation.terms(ours, heads, batch, features if self.online.teacher_gradient else features.detach())
        teacher_heads = head_logits(self.teacher, self.teacher_adapters, theirs)
        terms["teacher_ce"] = cross_entropy(teacher_heads[-1], targets_of(batch))
        if self.online.signal == "logits":
            terms |= self._logit_terms(heads[:-1], teacher_heads[:-1], targets_of(batch))
        return terms

    def _logit_terms(self, ours: list[Tensor], theirs: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        terms, weight = {}, self._supervision_share()
        for block, (student_logits, teacher_logits) in enumerate(zip(ours, theirs, strict=True), 1):
            terms[f"teacher_supervision_block_{block}"] = weight * cross_entropy(teacher_logits, targets)
            terms[f"logits_block_{block}"] = divergence_loss(student_logits, teacher_logits)
        return terms

    def _supervision_share(self) -> float:
        config = self.distillation.config
        return config.supervision_weight * (1 / len(self.teacher_adapters) if config.loss == "paper" else 1.0)


def supervision_adapters(model: DecoderModel, config: DistillConfig) -> nn.ModuleList:
    """One Linear(hidden -> d) per block before the last, for multiple supervision; dropped when a student is saved."""
    count = config.num_blocks - 1 if config.supervision_weight else 0
    return nn.ModuleList(nn.Linear(model.hidden_size, model.spec.item_dim, bias=False) for _ in range(count))


def head_logits(model: DecoderModel, adapters: nn.ModuleList, read: ReadStates) -> list[Tensor]:
    """Scores of the catalogue, in fp32: by each adapter from the end of its block, and by the model's head last.

    The catalogue's vectors are computed once.
    """
    last = model.num_layers - 1
    if model.user_proj is None:
        return [model.logits(read[last])]
    ends = block_ends(model.num_layers, len(adapters) + 1)
    with torch.autocast(read[last].device.type, enabled=False):
        items = model.item_outputs().T
        heads = zip([*adapters, model.user_proj], ends, strict=True)
        return [head(read[end].float()) @ items for head, end in heads]


def read_states(model: DecoderModel, ends: Sequence[int], batch: Batch) -> dict[int, Tensor]:
    """A model's states at the targets, after each of the named layers."""
    states, rows = model(batch.item_ids), target_rows(batch)
    return {end: rows_of(states[state_index(end)], rows) for end in ends}


def with_teacher(batch: Batch, found: Mapping[str, Tensor], *, has_prefix: bool) -> Batch:
    """A batch with what a frozen teacher says at its targets; features of those alone that can be compared."""
    fields = dict(found)
    if "features" in fields:
        fields["features"] = fields["features"][
            feature_targets(batch, has_prefix=has_prefix).to(fields["features"].device)
        ]
    return batch._replace(**fields)


def feature_targets(batch: Batch, *, has_prefix: bool) -> Bool[Tensor, " targets"]:
    """Which targets have comparable features: all, but without a prefix the first token is an attention sink.

    There a decoder's states are hundreds of times larger than anywhere else, and swamp every distance.
    """
    wanted = batch.targets != 0
    if has_prefix or batch.targets.shape != batch.item_ids.shape:  # read after a suffix
        return torch.ones(int(wanted.sum()), dtype=torch.bool, device=wanted.device)
    first = (batch.item_ids != 0).cumsum(dim=1) == 1
    return ~first[wanted]
