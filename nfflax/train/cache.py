"""Compiled programs kept between runs: a resumed run starts in seconds."""

import jax

from nfflax.folders import cache_folder


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told of another place.

    `JAX_COMPILATION_CACHE_DIR` names another, `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
