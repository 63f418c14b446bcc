"""One step of a recurrent network and its derivative. No cell knows of time.

* `cell`: the contract, all that the engine knows of a cell.
* `simple_rnn`: the plain RNN, written out.
* `activations`: an activation and what a gradient needs of it.
* `insides`: what goes on inside a step and is worth a look, such as gates.

Any other cell is compiled from its step. Two steps stand here, `lstm` and `gru`; what both
have in common is in `gates`.

* `tracing`: the step and its derivative as one graph; `refusals`: what it must not do.
* `probing`: tries the graph with numbers.
* `division`: what of the graph is computed where; `cuts`: what is kept for later.
* `derived`: the parts, run as the contract wants them.
* `plan`: what was found, in words.
"""
