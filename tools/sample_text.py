"""Text from a trained checkpoint: samples, and the blanks of a text filled in."""

from typing import Any

import numpy as np

from alphabar.core import text
from alphabar.core.text import Text
from alphabar.tools import command, dataset_file, sample_options, sampling, sheets, trained, word_classifier
from alphabar.tools.command import Failure, UserError
from alphabar.tools.config import EMBEDDED
from alphabar.tools.progress import Progress
from alphabar.tools.properties import CLASSES
from alphabar.tools.sampling import Guide
from alphabar.tools.trained import Trained

SHOWN = 8  # samples that are printed
CONTROL = ("classifier", "classifier_weight", "classes")  # options of the samples that are controlled


def draw(options: Any, network: Trained, where: str) -> int:
    """Draw texts, write and print them; returns the exit code."""
    outputs = command.outputs(options.out, ("samples.txt",), (".txt", ".h5"))
    controlled = CONTROL if network.config.method in EMBEDDED else ()
    refused = [name for name in sample_options.IMAGES_ONLY if name not in controlled]
    sample_options.refuse(options, refused, "goes with networks of images, not of text")
    config = sample_options.chosen(options, network.config)
    length = network.shape[0]
    letters = Text(np.zeros(length, np.uint8), length)
    given, known = None, None
    if options.infill is not None:
        given, known = _blanks(options.infill, letters)
    try:
        sampler = sampling.sampler(network.process, config.sample)
    except ValueError as e:
        raise UserError(str(e)) from e
    labels, how, asked = _control(options, network)
    if asked and (config.sample.sampler, config.sample.eta) == ("ddim", 0):
        raise UserError("--classifier goes with a sampler that adds noise: ddpm, or ddim with --eta above 0")
    if asked and known is not None and config.sample.resample > 1:
        raise UserError("sample.resample must be 1 with --classifier")
    try:
        with Progress("sampling", options.n * sampler.rows, 0, options.quiet, "text step") as bar:
            what = (network.process, network.net, sampler, labels, options.n, options.seed)
            blocks = list(sampling.draw(*what, batch=options.batch, progress=bar.advance, how=how, known=known))
    except ValueError as e:
        raise Failure(f"no samples could be drawn: {e}") from e
    tokens = np.concatenate(blocks)
    texts = [letters.decode(row if given is None else row[: len(given)]) for row in tokens]
    title = f"{network.path.name}, {sampler.name}, {asked}seed {options.seed}"
    attributes = {**sample_options.stated(options, network, config), "seed": options.seed}
    if asked:
        attributes |= {"classifier": options.classifier.name, "classifier_weight": options.classifier_weight}
        attributes["control"] = asked.rstrip(", ")
    if given is not None:
        attributes["infill"] = given
    try:
        if ".txt" in outputs:
            sheets.write_text(title, texts if given is None else [given, *texts], outputs[".txt"])
        if ".h5" in outputs:
            dataset_file.write_tokens(outputs[".h5"], tokens, text.ALPHABET, attributes)
    except OSError as e:
        raise Failure(f"the samples could not be written ({e.strerror or e})") from e
    if not options.quiet:
        for shown in texts[:SHOWN]:
            print(sheets.paragraph(shown), end="\n\n")
        for out in outputs.values():
            print(f"wrote {out}: {options.n:,} texts of {length} letters, on {where}")
    return 0


def _control(options: Any, network: Trained) -> tuple[np.ndarray | None, Guide | None, str]:
    """(the class of every sample, how they are steered to it, what is asked in words) where there is a classifier."""
    if options.classifier is None:
        sample_options.refuse(options, ("classes", "classifier_weight"), "goes with --classifier")
        return None, None, ""
    by = word_classifier.load(options.classifier, network)
    number = trained.class_number(options.classes, CLASSES)
    if number is None:
        raise UserError(f"--classifier needs --class {' or '.join(CLASSES)}, whether the text shall have {by.property}")
    asked = f"{by.property} {CLASSES[number]} × {options.classifier_weight:g}, "
    return np.full(options.n, number), Guide(gradient=by.gradient, classifier_weight=options.classifier_weight), asked


def _blanks(asked: str, letters: Text) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """(the text in the letters of the network, (tokens, which of them are given)); what comes after it is blank too."""
    tokens = letters.encode(asked)
    if not np.any(tokens == letters.states):
        raise UserError(f"--infill takes a text with blanks, one _ for each letter, not {asked!r}")
    if len(tokens) > letters.length:
        raise UserError(f"--infill takes at most {letters.length} letters, those of a window, not {len(tokens)}")
    values = np.full(letters.length, letters.states, np.int32)
    values[: len(tokens)] = tokens
    return letters.decode(tokens), (values, values < letters.states)
