"""How TensorFlow is used: no mathematics of recurrent networks, no Keras layer.

* `execution`: cached graphs, XLA, processor cores.
* `explicit`: a function with a gradient that is written out.
* `tensors`: zeros, products and sums of tensors, made safely.
* `slices`: parts of a tensor, and tensors as parts, each the gradient of the other.
* `subgraphs`: parts of a traced graph, each run by itself; `simplify`: makes it lean.
* `wording`: what errors call the things that they are about.
"""
