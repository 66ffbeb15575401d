"""The families of transition matrices of discrete diffusion; what they share is said in :class:`Transitions`. Eq: S4-C5, S4-F2.

    Uniform              a step replaces the state by any of K                 closed forms, O(K)
    Absorbing            a step replaces the state by the mask                 closed forms, O(K)
    DiscretizedGaussian  a step moves to near states of an ordered scale       few dense Q̄_t, then low-rank factors
    NearestNeighbour     a step moves to near states of an embedding           a series, then few eigenvectors
    Dense                any matrices                                          K×K for every t

β_1, …, β_T come from :mod:`alphabar.core.rates` or from any schedule (``schedules.linear().beta``).
"""

from .transition import Dense, Transitions
from .transitions_closed import Absorbing, Uniform, transition_absorbing, transition_uniform
from .transitions_gaussian import DiscretizedGaussian, transition_discretized_gaussian
from .transitions_neighbour import NearestNeighbour, neighbour_rates

__all__ = [
    "Absorbing",
    "Dense",
    "DiscretizedGaussian",
    "NearestNeighbour",
    "Transitions",
    "Uniform",
    "neighbour_rates",
    "transition_absorbing",
    "transition_discretized_gaussian",
    "transition_uniform",
]
