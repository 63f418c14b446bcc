"""The options of a layer that say how its gradient is computed, checked and configured."""

import keras

from keras_bptt.layers import arguments
from keras_bptt.truncation import RandomizedTruncation, policy

# All of them but `unroll`, which is the host's.
OPTIONS = (
    "truncation",
    "checkpoint_every",
    "adjoint_clipnorm",
    "adjoint_max_growth",
    "jit_compile",
)


class GradientOptions:
    """What a recurrent layer of Keras has beside its host's arguments.

    Every option may be set on a layer that is built. What has been traced before goes on
    with the former one.
    """

    @property
    def truncation(self):
        """Which paths of the gradient are kept; may be set.

        What has been traced before goes on with the former one: after a change compile the
        model again. So it is with `checkpoint_every`, `adjoint_clipnorm`,
        `adjoint_max_growth`, `jit_compile`, `unroll` and `cell.activation`.
        """
        return self._truncation

    @truncation.setter
    def truncation(self, value):
        value = policy(value)
        if isinstance(value, RandomizedTruncation):
            if self.built:
                raise ValueError(
                    "A RandomizedTruncation has a state, which no layer that is built can "
                    f"get. Received: truncation={value}. Make the layer with it."
                )
            self._truncation_draws = keras.random.SeedGenerator(value.seed)
        self._truncation = value

    @property
    def checkpoint_every(self):
        """How many steps lie between states that are kept; set as `truncation` is."""
        return self._checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, value):
        self._checkpoint_every = arguments.checkpoint_every_of(value)

    @property
    def adjoint_clipnorm(self):
        """The largest norm of dL/ds_t, all states of an example; set as `truncation` is."""
        return self._adjoint_clipnorm

    @adjoint_clipnorm.setter
    def adjoint_clipnorm(self, value):
        self._adjoint_clipnorm = arguments.clipnorm_of(value, self.compute_dtype)

    @property
    def adjoint_max_growth(self):
        """The largest |dL/ds_t| as a multiple of what was sent; set as `truncation` is."""
        return self._adjoint_max_growth

    @adjoint_max_growth.setter
    def adjoint_max_growth(self, value):
        self._adjoint_max_growth = arguments.max_growth_of(value)

    @property
    def jit_compile(self):
        """Whether XLA compiles the recurrence; set as `truncation` is."""
        return self._jit_compile

    @jit_compile.setter
    def jit_compile(self, value):
        self._jit_compile = arguments.jit_compile_of(value)

    @property
    def unroll(self):
        """Whether all steps are written into the graph; set as `truncation` is."""
        return arguments.all_steps(self._unroll)

    @unroll.setter
    def unroll(self, value):
        self._unroll = arguments.unroll_of(value)

    def get_config(self):
        config = super().get_config()
        config["unroll"] = self._unroll
        for name in OPTIONS:
            value = getattr(self, name)
            # Left out where they say nothing, so that the host can take the configuration.
            if value not in (None, "auto"):
                config[name] = keras.saving.serialize_keras_object(value)
        return config
