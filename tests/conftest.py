"""Eight CPU devices for the whole suite, and no silent broadcasting."""

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
