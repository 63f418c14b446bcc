"""One step of a recurrent network and its derivative. No cell knows of time.

* `cell`: the contract, all that the engine knows of a cell.
* `simple_rnn`: the plain RNN, written out.
* `activations`: an activation and what a gradient needs of it.
"""
