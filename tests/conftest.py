"""Eight CPU devices for the whole suite, and no silent broadcasting."""

import jax

jax.config.update('jax_num_cpu_devices', 8)
# Most of the suite's time is compilation: a third less of it. Programs that
# tests start as processes of their own are compiled in full.
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
