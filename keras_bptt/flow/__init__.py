"""The gradient flow of a model: measured, explained, drawn, logged.

* `gradient_flow`: the function `gradient_flow`.
* `recording`: what the layers of a model are given; `inputs`: checks, and the loss.
* `measurement`: the numbers of one call of a layer. Of single losses they are in `lags`, of
  gates and units in `inside`, of a plain RNN's U in `spectrum`.
* `verdict`, `advice`, `finiteness`: the numbers in words.
* `layer_flow`, `model_flow`: what it returns, `LayerFlow` and `GradientFlow`.
* `plot`, `curves`: figures of it, and what they are drawn with.
* `batch`: the one batch that callbacks measure.
* `windows`: the bias of a truncation, estimated.
* `quantities`: the numbers of it that callbacks log.
* `tensorboard`: events of numbers and pictures, for the callbacks.
"""
