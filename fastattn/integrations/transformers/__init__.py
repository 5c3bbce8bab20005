"""Hugging Face transformers on fastattn.

    import fastattn.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="fastattn")      attention alone
    fastattn.accelerate(model)                                                   attention and all else that is known

attention   the attention function and the mask function, registered on import under the name "fastattn"
packing     encoders that leave the padding out
families    which parts of which model are fused: one row a class
dispatching turns models to this attention and back
"""

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"fastattn works with transformers 5 and newer, but {transformers.__version__} is installed; "
        "upgrade with: pip install -U transformers"
    )

from . import attention, families

__all__ = ["attention", "families"]

attention.register()
families.register()
