"""Which query answers for which target: the minimum-cost one-to-one assignment."""

import jax
import jax.numpy as jnp
import optax

from zegformer_jax.training.losses import FOCAL_ALPHA
from zegformer_jax.training.targets import Targets


def focal_cost(logits_qp: jax.Array, masks_np: jax.Array) -> jax.Array:
    """Mean focal loss over pixels of every query against every target, [Q, N]."""
    probability = jax.nn.sigmoid(logits_qp)
    inside_qp = FOCAL_ALPHA * (1 - probability) ** 2 * jax.nn.softplus(-logits_qp)
    outside_qp = (1 - FOCAL_ALPHA) * probability**2 * jax.nn.softplus(logits_qp)
    cost_qn = inside_qp @ masks_np.T + outside_qp @ (1 - masks_np).T
    return cost_qn / logits_qp.shape[-1]


def dice_cost(logits_qp: jax.Array, masks_np: jax.Array) -> jax.Array:
    """Dice loss of every query against every target, [Q, N]."""
    probability = jax.nn.sigmoid(logits_qp)
    overlap_qn = 2 * probability @ masks_np.T
    total_qn = probability.sum(-1)[:, None] + masks_np.sum(-1)[None]
    return 1 - (overlap_qn + 1) / (total_qn + 1)


def cost_matrix(
    class_logits_qc: jax.Array,
    mask_logits_qp: jax.Array,
    ids_n: jax.Array,
    masks_np: jax.Array,
    mask_weight: float,
    dice_weight: float,
) -> jax.Array:
    """Cost of giving target n to query q, float32 [Q, N] (MaskFormer, 2021).

    Args:
        class_logits_qc: [Q, C + 1], the last column is "no object".
        mask_logits_qp: [Q, P], over the pixels at the logits' own resolution.
        ids_n: class of every target.
        masks_np: {0, 1} float32 [N, P].
        mask_weight: of the focal cost.
        dice_weight: of the dice cost.
    """
    cost_class = -jax.nn.softmax(class_logits_qc.astype(jnp.float32))[:, ids_n]
    logits_qp = mask_logits_qp.astype(jnp.float32)
    return (
        cost_class
        + mask_weight * focal_cost(logits_qp, masks_np)
        + dice_weight * dice_cost(logits_qp, masks_np)
    )


def assign(cost_qn: jax.Array, valid_n: jax.Array) -> jax.Array:
    """The query of every target, int32 [N], such that the valid targets' total cost is least.

    Args:
        cost_qn: [Q, N], finite, N <= Q.
        valid_n: bool [N]; padded targets get some query that no valid target has.

    Raises:
        ValueError: there are more targets than queries.
    """
    queries, targets = cost_qn.shape
    if targets > queries:
        raise ValueError(
            f"{targets} targets for {queries} queries: loss.max_targets must not exceed "
            "model.transformer.queries"
        )
    cost_nq = jnp.where(valid_n[:, None], cost_qn.T, 0.0)
    target_n, query_n = optax.assignment.hungarian_algorithm(cost_nq)
    return jnp.zeros(targets, jnp.int32).at[target_n].set(query_n.astype(jnp.int32))


def match(
    class_logits_bqc: jax.Array,
    mask_logits_bqhw: jax.Array,
    targets: Targets,
    mask_weight: float,
    dice_weight: float,
) -> jax.Array:
    """Assigns every target of every image to a query, int32 [B, N]; no gradient flows.

    The targets' masks are sampled to the logits' resolution by nearest neighbour, which at an
    integer factor k is every k-th pixel. Costs that are not finite give some assignment; the
    loss is then not finite either, and the training step reports it.
    """
    batch, queries, height, width = mask_logits_bqhw.shape
    full_height, full_width = targets.masks_bnhw.shape[2:]
    masks_bnhw = targets.masks_bnhw[:, :, :: full_height // height, :: full_width // width]
    masks_bnp = masks_bnhw.astype(jnp.float32).reshape(batch, -1, height * width)
    logits_bqp = mask_logits_bqhw.reshape(batch, queries, height * width)

    def match_image(class_logits_qc, logits_qp, ids_n, masks_np, valid_n):
        cost_qn = cost_matrix(class_logits_qc, logits_qp, ids_n, masks_np, mask_weight, dice_weight)
        return assign(jnp.nan_to_num(cost_qn), valid_n)

    matched_bn = jax.vmap(match_image)(
        class_logits_bqc, logits_bqp, targets.ids_bn, masks_bnp, targets.valid_bn
    )
    return jax.lax.stop_gradient(matched_bn)
