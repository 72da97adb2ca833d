"""How does a person start, watch and end a run? (imported as ``dtrain.launch``)"""
