"""Is the feature that stands for a country seen in the attribution graph of its capital? Measured on the toy.

    uv run python tools/country_features.py             # the countries that were held out
    uv run python tools/country_features.py --chosen    # those that the dictionaries were chosen with

For each country:

1. Its feature is found without capitals: in sentences about languages, currencies and continents, the feature of
   `transcoder_0` whose mean activation at the country's token exceeds that for every other country by most.
2. The graph is that of "The capital of {country} is", and of the logit of the capital less the mean logit of all other
   capitals. What does the graph say that the feature does?
3. The feature is ablated in the model. Controls act at the same layer and position, and change what the feed-forward
   returns by a vector of the same length or a longer one: other active features, drawn at random and ablated together
   until their vector is as long (20 draws); and the same activation taken from other features of the transcoder
   (20 draws).
4. The feature is replaced by that of another country, at its mean activation in the sentences. Control: by that of a
   third country, or by another feature of the transcoder at the same activation.

Countries whose name has a checksum that 3 divides were used to choose the sizes of dictionaries and the
criteria below. They were written down before the others were run.
"""
