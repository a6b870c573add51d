"""What the recurrence has to compute and to move, whoever computes it."""

from nestax.models.memory.types import MemoryConfig


def flops_per_token(cfg: MemoryConfig, K: int) -> float:
  """Forward FLOPs of one head of width K; with the backward pass three times.

  Counts the matmuls of the chunk form at the step's.
  """
  C = cfg.step
  R = max(stop for _, stop in cfg.rows(K).values())
  wide = sum(K * cfg.expansion for _ in cfg.deep)
  # reads of x, of the errors, of D in the system, and the outer update
  errors = cfg.objective == 'l2' or cfg.generated
  passes = bool(cfg.adaptive) + errors + cfg.delta + 1
  flops = 2.0 * passes * (R * K + wide * K)
  # Q K^T and the chunk's own reads; K K^T, T rhs and the inverse of I + L
  flops += 2.0 * 2 * C * K
  if cfg.delta:
    flops += 2.0 * (C * K + C * R + C * C / 3)
  if cfg.momentum:
    flops += 2.0 * (2 * R * K + C * R + C * K + 2 * C * C)
  return flops


def bytes_per_token(K: int, itemsize: int, backward: bool) -> int:
  """Bytes that one head must at least read and write, states left out.

  Query, key, value in, the output out in float32; the backward pass reads
  them and the output's gradient, and writes three gradients.
  """
  forward = 3 * K * itemsize + 4 * K
  return 2 * forward + 3 * K * itemsize if backward else forward
