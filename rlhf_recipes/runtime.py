"""Settings of the process itself, made before a stage runs."""

import os
import warnings


def configure(seed: int) -> None:
    """Seeds python, numpy and torch, uses all cores, and silences other packages' deprecation notices.

    `accelerate launch` without a config file sets OMP_NUM_THREADS=1, which halves the speed on two cores. The cores this
    process may use are shared out among the processes of the machine; with a GPU the setting is left alone.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")

    import torch
    from transformers import set_seed
    from transformers.utils import logging

    set_seed(seed)

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
