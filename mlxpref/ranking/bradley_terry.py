"""Bradley-Terry with random effects: judged pairs become strengths with their uncertainty.

Images are numbers from 0 to N - 1, strengths are log-odds in nats. An answer, with a shown first or second, is

    log-odds of a = scale * (strength of a - strength of b) + e  +- (bias + u)

e is the noise of the pair, which both orders share; u is what the position bias of this pair has beyond the judge's
bias. Both are normal, and their variances are estimated: where u varies much, only the mean of both orders counts;
where it does not, one order does. Every instrument (reading, thinking) has a scale, a bias and variances of its own.

Vote shares, as of people, have another noise: a share p has the variance dispersion * p (1 - p), and e is 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from mlxpref.ranking.covariance import Covariance, DenseCovariance
from mlxpref.ranking.log_odds import log_odds
from mlxpref.ranking.noise import BIAS, ONE_ANSWER, Noise, NoiseSearch, ScoringSteps, WorkingAnswers
from mlxpref.ranking.outcomes import Array, Outcomes, PairOutcome
from mlxpref.ranking.threads import one_thread
from mlxpref.ranking.working_model import Design, WorkingModel, working_model

PRIOR_DEVIATION = 3.0  # nats; of the position bias, and of strengths as expected before any answer
PRIOR_DOUBT = 1.0  # of the log deviation of strengths: a factor of e either way
SCALE_DOUBT = 2.0  # of an instrument's log scale against the reference's
MAX_UPDATES = 200  # of everything together; 5 to 15 suffice, with many saturated answers up to 40
SPREAD_CAUTION = 3.0  # the fitted deviation's variance over its inverse Fisher information, see fit_strengths
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Instrument:
    """What the answers of one way of judging show of it.

    `scale`: its log-odds for one nat of strength. `position_bias` is above 0 if it favours the first image.
    """

    scale: float
    position_bias: float
    position_bias_stderr: float
    noise: Noise

    def answer_variance(self, p_model: Array, orders: int) -> Array:
        """Expected probabilities (K,) -> the variance of the difference of strengths that an answer gives.

        In both `orders`, or in one.
        """
        variance = self.noise.of_mean(p_model)
        if orders == 1:
            variance = variance + self.noise.of_difference(p_model)
        return variance / self.scale**2


@dataclass(frozen=True)
class StrengthFit:
    """The posterior of strengths: normal, or Student's with `degrees_of_freedom` where the noise is estimated.

    `strengths` (N,) have mean 0. `covariance` is that of the centred strengths, times Student's 97.5 % quantile over
    the normal one, squared (`widening`), so that 1.96 of its standard errors are a 95 % interval. `deviation` is that
    of the strengths' prior. Strengths have the scale of the last instrument.
    """

    strengths: Array
    covariance: Covariance
    instruments: tuple[Instrument, ...]
    degrees_of_freedom: float = math.inf
    deviation: float = PRIOR_DEVIATION

    @property
    def reference(self) -> Instrument:
        """The last instrument, whose scale is 1: thinking, where there is any."""
        return self.instruments[-1]

    @property
    def widening(self) -> float:
        """Student's 97.5 % quantile over the normal one."""
        return widening(self.degrees_of_freedom)

    def instrument(self, number: int) -> Instrument:
        """An instrument, or the last one in place of one that has no answers yet."""
        return self.instruments[min(number, len(self.instruments) - 1)]


@one_thread()
def fit_strengths(count: int, outcomes: Sequence[PairOutcome], known: Mapping[int, Noise] | None = None) -> StrengthFit:
    """Strengths, maximum a posteriori, and their covariance; errors as in `Outcomes`.

    Penalised quasi-likelihood (Breslow & Clayton 1993): the answers' latent log-odds z are the joint optimum with
    strengths, biases and scales, and stand for normal working responses. In turn, the variances of noise and bias take
    a step of Fisher scoring from pair residuals (`NoiseSearch`), and so does the deviation of the strengths' prior.

    Empirical Bayes: where earlier answers choose the pairs, the best so far owe some of their lead to luck, and only a
    prior of the right width takes that back. Its uncertainty widens the covariance along d strengths / d log
    deviation, by `SPREAD_CAUTION` times its inverse information, which takes answers as normal.

    Without a cycle of pairs (two images, a tree) no noise can be seen: then an answer is as sure as it says, so that
    the stronger of two images is the best with the probability that the judge gave it: the last instrument, as nothing
    shows how far another one can be trusted. `known` is what earlier rankings showed of the instruments' noise.

    Of more than `DENSE_IMAGES` images the sums of variances that these steps need are means over draws, always the
    same: strengths then depend on the images' numbers by a few hundredths of a standard error.
    """
    data = Outcomes(count, outcomes)
    last = np.flatnonzero(data.instrument == data.instruments - 1)
    if count == 2 and len(last) == 1 and data.known[:, last].all():
        return _of_one_pair(outcomes[int(last[0])])
    state = _State(data, known or {})
    for _ in range(MAX_UPDATES):
        if state.update() < 1e-4:
            break
    freedom = _total_freedom(data, state.working, state.noises)
    strengths = state.parameters[:count]
    return StrengthFit(
        strengths=strengths - strengths.mean(),
        covariance=state.model.covariance(state.doubts(), widening(freedom) ** 2),
        instruments=tuple(state.instrument(number) for number in range(data.instruments)),
        degrees_of_freedom=freedom,
        deviation=math.exp(state.log_deviation),
    )


def _of_one_pair(pair: PairOutcome) -> StrengthFit:
    """The fit of two images to their only pair, in both orders: its sureness is the judge's own, see `ONE_ANSWER`."""
    first, second = log_odds(np.array([pair.p_a_shown_first, pair.p_a_shown_second], np.float64)).tolist()
    sign = np.array([1.0, -1.0]) if pair.a < pair.b else np.array([-1.0, 1.0])
    instrument = Instrument(1.0, (first - second) / 2, math.sqrt(ONE_ANSWER), Noise(ONE_ANSWER, BIAS))
    return StrengthFit(
        strengths=(first + second) / 4 * sign,
        covariance=DenseCovariance(ONE_ANSWER / 4 * np.outer(sign, sign)),
        instruments=(instrument,) * (pair.instrument + 1),
    )


def widening(freedom: float) -> float:
    """Student's 97.5 % quantile over the normal one."""
    return float(stdtrit(freedom, 0.975)) / Z95 if math.isfinite(freedom) else 1.0


class _State:
    """Everything that a fit estimates.

    `parameters` (N + M,): strengths, and biases of M instruments; `exponents` (M,): their log scales. `z` (2, K): the
    latent log-odds of a.
    """

    def __init__(self, data: Outcomes, known: Mapping[int, Noise]) -> None:
        self.data = data
        self.bias = data.count + data.instrument  # (K,) the column of a pair's bias
        self.columns = np.stack([data.a, data.b])  # (2, K)
        self.parameters: Array = np.zeros(data.count + data.instruments)
        self._model: WorkingModel | None = None
        self.searches = [NoiseSearch(data, number, known.get(number)) for number in range(data.instruments)]
        self.scale_steps = [ScoringSteps(0.5) for _ in range(data.instruments - 1)]
        self.deviation_steps = ScoringSteps(1.0)
        size = self._log_odds_size()  # (M,)
        self.exponents: Array = np.clip(np.log(size / size[-1]), -5, 5)
        self.log_deviation = math.log(min(max(float(size[-1]) / math.sqrt(2), 1e-3), PRIOR_DEVIATION))
        margin = np.array([noise.margin for noise in self.noises])[data.instrument]  # (K,)
        self.z = log_odds(np.clip(np.nan_to_num(data.p, nan=0.5), margin, 1 - margin))

    @property
    def model(self) -> WorkingModel:
        """The working model of the last step."""
        assert self._model is not None
        return self._model

    @property
    def noises(self) -> list[Noise]:
        """The noise of every instrument."""
        return [search.noise for search in self.searches]

    def update(self) -> float:
        """One step of everything; the largest change."""
        data, before = self.data, self.parameters
        self.working = working = WorkingAnswers(data, self.z, self.noises)
        slope = np.exp(self.exponents)[data.instrument]  # (K,)
        self.values = np.stack([slope, -slope])  # (2, K) d lead / d strengths
        prior = np.repeat([math.exp(-2 * self.log_deviation), PRIOR_DEVIATION**-2.0], [data.count, data.instruments])
        precisions = working.lead_precision, working.cross_precision, working.bias_precision
        design = Design(data.count, self.columns, self.values, self.bias, *precisions, prior)
        self._model = model = working_model(design, self._model)
        self.parameters = model.solve(self._of_parameters(working.response_lead, working.response_bias), before)

        lead = (self.values * self.parameters[self.columns]).sum(axis=0)  # (K,) log-odds without the bias
        working.fit_to(lead, self.parameters[self.bias])
        latent = np.clip(working.latent(lead, self.parameters[self.bias]) - self.z, -4, 4)
        self.z = self.z + latent
        leverage = model.leverage()
        change = [np.abs(latent[data.known]).max(initial=0), np.abs(self.parameters - before).max()]
        change += [search.update(working, leverage) for search in self.searches]
        change += [self._update_scales(lead, leverage), self._update_deviation()]
        return float(max(change))

    def instrument(self, number: int) -> Instrument:
        """What is found of an instrument."""
        bias = self.data.count + number
        noise = self.noises[number]
        # Without pairs in both orders only the sum of the variances shows.
        freedom = max(noise.bias_freedom or noise.freedom, 1.0)
        variance = self.model.bias_variance(bias) * widening(freedom) ** 2
        return Instrument(math.exp(self.exponents[number]), float(self.parameters[bias]), math.sqrt(variance), noise)

    def doubts(self) -> list[tuple[Array, float]]:
        """How strengths follow what is taken as known, (N,) each, and the variance of that: prior width and scales."""
        strengths = np.arange(len(self.parameters)) < self.data.count
        pull = 2 * math.exp(-2 * self.log_deviation) * self.parameters * strengths
        drifts = [(self.model.solve(pull), SPREAD_CAUTION / self.information), *self.scale_doubts]
        return [(drift[strengths] - drift[strengths].mean(), variance) for drift, variance in drifts]

    def _log_odds_size(self) -> Array:
        """(M,): the root mean square of every instrument's log-odds; of extreme ones as if they were 4 nats."""
        data = self.data
        sizes = np.ones(data.instruments)
        for number in range(data.instruments):
            p = data.p[:, data.instrument == number]
            if (p := p[~np.isnan(p)]).size:
                sizes[number] = max(math.sqrt(float((np.clip(log_odds(p), -4, 4) ** 2).mean())), 1e-4)
        return sizes

    def _of_parameters(self, of_leads: Array, of_biases: Array) -> Array:
        """(K,) slopes in the pairs' leads and biases -> (N + M,) slopes in the parameters."""
        size = len(self.parameters)
        strengths = np.bincount(self.columns.ravel(), (self.values * of_leads).ravel(), size)
        return np.asarray(strengths + np.bincount(self.bias, of_biases, size), np.float64)

    def _update_scales(self, lead: Array, leverage: tuple[Array, Array, Array]) -> float:
        """A step of Fisher scoring of every log scale but the reference's, at most 0.5; the largest step.

        It maximises the marginal likelihood: the joint one would shrink the strengths and let the scales grow.
        """
        working, (variance, cross, _) = self.working, leverage
        precision, mixed = working.lead_precision, working.cross_precision
        self.scale_doubts, largest = [], 0.0
        for number, steps in enumerate(self.scale_steps):
            own = self.data.instrument == number
            growth = own * lead  # (K,) d lead / d log scale
            slope = float((working.left_lead * growth - own * (precision * variance + mixed * cross)).sum())
            pull = self._of_parameters(precision * growth, mixed * growth)
            information = float((precision * growth**2).sum() - pull @ self.model.solve(pull))
            information = max(information, 0.0) + SCALE_DOUBT**-2.0
            drift = self.model.solve(self._of_parameters(own * working.left_lead, 0 * lead) - pull)
            self.scale_doubts.append((drift, 1 / information))
            step = steps.next(slope - self.exponents[number] / SCALE_DOUBT**2, information)
            self.exponents[number] += step
            largest = max(largest, abs(step))
        return largest

    def _update_deviation(self) -> float:
        """A step of Fisher scoring of the log deviation of the strengths' prior, at most 1; the step's size.

        It maximises the marginal likelihood times a log-normal prior (median `PRIOR_DEVIATION`, deviation of the
        logarithm `PRIOR_DOUBT`), which decides where data say little and keeps it from 0 and infinity.
        """
        count, precision = self.data.count, math.exp(-2 * self.log_deviation)
        strengths = self.parameters[:count] - self.parameters[:count].mean()
        known, square = self.model.known()
        doubt = (self.log_deviation - math.log(PRIOR_DEVIATION)) / PRIOR_DOUBT**2
        slope = precision * float(strengths @ strengths) - known - doubt
        # The share of every direction that the data know; plus the log-normal's.
        self.information = 2 * square + PRIOR_DOUBT**-2.0
        step = self.deviation_steps.next(slope, self.information)
        self.log_deviation += step
        return abs(step)


def _total_freedom(data: Outcomes, working: WorkingAnswers, noises: Sequence[Noise]) -> float:
    """Degrees of freedom of all noise together, by Satterthwaite's rule over the instruments' shares of information.

    Infinite where no noise is estimated: there an answer is taken to be as sure as it says.
    """
    shares = np.bincount(data.instrument, working.lead_precision, data.instruments)
    if not shares.sum():
        return math.inf
    shares = shares / shares.sum()
    doubt = sum(share**2 / noise.freedom for share, noise in zip(shares, noises, strict=True) if noise.freedom)
    return max(1.0 / doubt, 1.0) if doubt else math.inf
