"""What fastattn knows of other libraries' modules, and how it takes their place.

swap           a module becomes another class in place, and back
patterns       the fused forwards, each written once, by the names that a module gives to its parts
torch_nn       torch.nn's classes
transformers   Hugging Face: attention through its registry, packing of padded batches, one table row a class
"""
