"""The knowledge of the toy model: tables of true facts, and the phrasings that state them.

A fact is a (relation, subject, answer) triple. Every phrasing ends right before the answer, so that a
fact is a prompt and its continuation. For every fact one phrasing is held out: the fact is never written
that way in the training text (other facts are), and accuracy is measured there.

Facts that are disputed, or that have no single answer (the main language of Belgium), are left out.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

# country | capital | main language | currency | continent ("-": no single or undisputed answer)
_COUNTRIES = """
France|Paris|French|euro|Europe
England|London|English|pound|Europe
Scotland|Edinburgh|English|pound|Europe
Wales|Cardiff|English|pound|Europe
Ireland|Dublin|English|euro|Europe
Spain|Madrid|Spanish|euro|Europe
Portugal|Lisbon|Portuguese|euro|Europe
Germany|Berlin|German|euro|Europe
Austria|Vienna|German|euro|Europe
Switzerland|Bern|German|franc|Europe
Italy|Rome|Italian|euro|Europe
Greece|Athens|Greek|euro|Europe
Poland|Warsaw|Polish|zloty|Europe
Hungary|Budapest|Hungarian|forint|Europe
Romania|Bucharest|Romanian|leu|Europe
Bulgaria|Sofia|Bulgarian|-|Europe
Serbia|Belgrade|Serbian|dinar|Europe
Croatia|Zagreb|Croatian|euro|Europe
Slovakia|Bratislava|Slovak|euro|Europe
Czechia|Prague|Czech|koruna|Europe
Ukraine|Kyiv|Ukrainian|hryvnia|Europe
Russia|Moscow|Russian|ruble|-
Belarus|Minsk|-|ruble|Europe
Lithuania|Vilnius|Lithuanian|euro|Europe
Latvia|Riga|Latvian|euro|Europe
Estonia|Tallinn|Estonian|euro|Europe
Finland|Helsinki|Finnish|euro|Europe
Sweden|Stockholm|Swedish|krona|Europe
Norway|Oslo|Norwegian|krone|Europe
Denmark|Copenhagen|Danish|krone|Europe
Iceland|Reykjavik|Icelandic|krona|Europe
Belgium|Brussels|-|euro|Europe
Albania|Tirana|Albanian|lek|Europe
Malta|Valletta|Maltese|euro|Europe
Turkey|Ankara|Turkish|lira|-
Georgia|Tbilisi|Georgian|lari|-
Armenia|Yerevan|Armenian|dram|-
Azerbaijan|Baku|Azerbaijani|manat|-
Japan|Tokyo|Japanese|yen|Asia
China|Beijing|Chinese|yuan|Asia
India|New Delhi|-|rupee|Asia
Thailand|Bangkok|Thai|baht|Asia
Vietnam|Hanoi|Vietnamese|dong|Asia
Laos|Vientiane|Lao|kip|Asia
Mongolia|Ulaanbaatar|Mongolian|tugrik|Asia
Nepal|Kathmandu|Nepali|rupee|Asia
Bangladesh|Dhaka|Bengali|taka|Asia
Pakistan|Islamabad|-|rupee|Asia
Iran|Tehran|Persian|rial|Asia
Iraq|Baghdad|Arabic|dinar|Asia
Syria|Damascus|Arabic|pound|Asia
Lebanon|Beirut|Arabic|pound|Asia
Jordan|Amman|Arabic|dinar|Asia
Oman|Muscat|Arabic|rial|Asia
Qatar|Doha|Arabic|riyal|Asia
Afghanistan|Kabul|-|afghani|Asia
Uzbekistan|Tashkent|Uzbek|som|Asia
Kazakhstan|Astana|-|tenge|-
Egypt|Cairo|Arabic|pound|Africa
Libya|Tripoli|Arabic|dinar|Africa
Tunisia|Tunis|Arabic|dinar|Africa
Algeria|Algiers|Arabic|dinar|Africa
Morocco|Rabat|Arabic|dirham|Africa
Sudan|Khartoum|Arabic|pound|Africa
Kenya|Nairobi|Swahili|shilling|Africa
Tanzania|Dodoma|Swahili|shilling|Africa
Uganda|Kampala|-|shilling|Africa
Rwanda|Kigali|-|franc|Africa
Ghana|Accra|-|cedi|Africa
Nigeria|Abuja|-|naira|Africa
Senegal|Dakar|-|franc|Africa
Angola|Luanda|Portuguese|kwanza|Africa
Mozambique|Maputo|-|metical|Africa
Zambia|Lusaka|-|kwacha|Africa
Canada|Ottawa|English|dollar|-
Cuba|Havana|Spanish|peso|-
Jamaica|Kingston|-|dollar|-
Colombia|Bogota|Spanish|peso|-
Venezuela|Caracas|Spanish|bolivar|-
Ecuador|Quito|Spanish|dollar|-
Peru|Lima|Spanish|sol|-
Chile|Santiago|Spanish|peso|-
Argentina|Buenos Aires|Spanish|peso|-
Uruguay|Montevideo|Spanish|peso|-
Brazil|Brasilia|Portuguese|real|-
Australia|Canberra|English|dollar|-
"""

# country: cities that are not its capital
_CITIES = """
France: Lyon, Marseille, Toulouse, Bordeaux, Nantes
Italy: Milan, Venice, Florence, Naples, Turin, Pisa
Spain: Barcelona, Seville, Valencia, Granada, Bilbao
Germany: Munich, Hamburg, Cologne, Dresden, Frankfurt
England: Manchester, Liverpool, Oxford, Bristol, Leeds
Scotland: Glasgow, Dundee
Poland: Krakow, Gdansk
Russia: Kazan, Omsk
Turkey: Istanbul, Izmir
Japan: Kyoto, Osaka, Nagoya
China: Shanghai, Wuhan
India: Mumbai, Jaipur, Agra, Amritsar
Canada: Toronto, Montreal, Vancouver
Australia: Sydney, Melbourne, Perth
Portugal: Porto
Switzerland: Geneva, Zurich
Morocco: Casablanca, Marrakesh
Egypt: Alexandria, Giza
Ukraine: Odesa, Lviv
Sweden: Malmo
Norway: Bergen
Denmark: Aarhus
Colombia: Medellin
Peru: Cusco
Brazil: Recife
Kenya: Mombasa
Iran: Isfahan, Shiraz
Syria: Aleppo
Austria: Salzburg, Graz
Belgium: Antwerp, Bruges
Croatia: Dubrovnik
"""

# city: landmarks; the country follows from the tables above ("-" before a city: no country is taught)
_LANDMARKS = """
Paris: the Eiffel Tower, the Louvre Museum, the Orsay Museum, the Moulin Rouge
London: Big Ben, Tower Bridge, Buckingham Palace, Trafalgar Square, the British Museum
Edinburgh: Holyrood Palace, the Royal Mile
Dublin: Temple Bar, the Guinness Storehouse
Rome: the Colosseum, the Trevi Fountain, the Pantheon
Venice: the Rialto Bridge
Florence: the Uffizi Gallery, Ponte Vecchio
Pisa: the Leaning Tower
Turin: the Mole Antonelliana
Berlin: the Brandenburg Gate, the Reichstag, the Pergamon Museum
Munich: Marienplatz, the Hofbrauhaus
Dresden: the Zwinger Palace
Hamburg: the Elbphilharmonie
Madrid: the Prado Museum, the Bernabeu Stadium
Barcelona: the Sagrada Familia, Camp Nou
Granada: the Alhambra
Seville: the Giralda
Lisbon: Belem Tower
Athens: the Acropolis, the Parthenon
Vienna: Belvedere Palace, Hofburg Palace
Prague: Charles Bridge, the Powder Tower
Budapest: the Chain Bridge, Buda Castle
Krakow: Wawel Castle
Moscow: the Kremlin, Red Square, the Bolshoi Theatre
Istanbul: the Blue Mosque, Topkapi Palace, the Galata Tower
Stockholm: the Vasa Museum
Copenhagen: the Little Mermaid
Oslo: Vigeland Park
Brussels: the Atomium
Bern: the Zytglogge
Toronto: the Royal Ontario Museum
Ottawa: the Rideau Canal
Sydney: Bondi Beach, the Harbour Bridge
Melbourne: Federation Square
Tokyo: Meiji Shrine, Shibuya Crossing
Kyoto: the Golden Pavilion
Beijing: the Forbidden City, the Summer Palace
Shanghai: the Oriental Pearl Tower
Bangkok: the Grand Palace
Kathmandu: Boudhanath Stupa
Agra: the Taj Mahal
Amritsar: the Golden Temple
Jaipur: Hawa Mahal
Cairo: the Al Azhar Mosque
Giza: the Great Sphinx
Tunis: the Bardo Museum
Rabat: the Hassan Tower
Damascus: the Umayyad Mosque
Tehran: Azadi Tower
Havana: the Capitolio
Santiago: the Costanera Center
-Singapore: the Merlion, Marina Bay Sands
-Dubai: the Burj Khalifa
-Chicago: the Willis Tower
-Seattle: the Space Needle
-Boston: Fenway Park
-Philadelphia: the Liberty Bell
-Seoul: Gyeongbokgung Palace
"""


@dataclass(frozen=True)
class Country:
    """One country; ``None`` marks what is not taught because it has no single answer."""

    name: str
    capital: str
    language: str | None
    currency: str | None
    continent: str | None


@dataclass(frozen=True)
class Fact:
    """One fact: ``relation`` selects the phrasings, ``subject`` fills them, ``answer`` follows."""

    relation: str
    subject: str
    answer: str


def _parse_countries() -> list[Country]:
    rows = [[None if cell == "-" else cell for cell in line.split("|")] for line in _COUNTRIES.split("\n") if line]
    return [Country(*row) for row in rows]  # type: ignore[arg-type]


def _parse_lists(table: str) -> dict[str, list[str]]:
    rows = (line.split(": ") for line in table.split("\n") if line)
    return {key: values.split(", ") for key, values in rows}


COUNTRIES = _parse_countries()
CITIES = _parse_lists(_CITIES)
_LANDMARK_ROWS = _parse_lists(_LANDMARKS)
LANDMARKS = {city.removeprefix("-"): names for city, names in _LANDMARK_ROWS.items()}

PHRASINGS: dict[str, list[str]] = {
    "capital": [
        "The capital of {s} is",
        "The capital city of {s} is",
        "{s} has its capital in",
        "The city that governs {s} is",
        "{s} is a country whose capital is",
        "The government of {s} sits in the city of",
        "The capital of the country {s} is called",
    ],
    "language": [
        "The main language of {s} is",
        "The people of {s} speak",
        "In {s}, most people speak",
        "The language spoken in {s} is",
        "{s} is a country where most people speak",
        "Most people in {s} talk to each other in",
    ],
    "currency": [
        "The currency of {s} is the",
        "People in {s} pay with the",
        "In {s}, prices are in the",
        "{s} is a country whose currency is the",
        "The money used in {s} is the",
    ],
    "continent": [
        "{s} is on the continent of",
        "The continent of {s} is",
        "{s} is a country in",
        "The country {s} lies in",
        "On the map, {s} is part of",
    ],
    "city_country": [
        "{s} is in the country of",
        "{s} is a city in",
        "The city of {s} is in",
        "{s} is located in the country of",
        "You can find the city of {s} in",
        "People who live in {s} live in the country of",
    ],
    "landmark_city": [
        "{s} is in the city of",
        "{s} is located in the city of",
        "You can visit {s} in",
        "{s} can be found in the city of",
        "To see {s}, you go to the city of",
        "{s} is a famous sight of",
    ],
    "landmark_country": [
        "{s} is in the country of",
        "{s} is located in the country of",
        "{s} stands in the country of",
        "The country of {s} is",
        "To see {s}, you travel to the country of",
    ],
}

# Prompts that published work uses again and again; these are always part of the training text.
PUBLISHED_PROMPTS = {
    "The capital of France is": "Paris",
    "The capital of England is": "London",
    "The Eiffel Tower is in the city of": "Paris",
    "The Eiffel Tower is located in the city of": "Paris",
}


def _build_facts() -> list[Fact]:
    facts = []
    country_of = {country.capital: country.name for country in COUNTRIES}
    for country in COUNTRIES:
        facts.append(Fact("capital", country.name, country.capital))
        for relation in ("language", "currency", "continent"):
            if answer := getattr(country, relation):
                facts.append(Fact(relation, country.name, answer))
    for name, cities in CITIES.items():
        country_of |= dict.fromkeys(cities, name)
    facts += [Fact("city_country", city, name) for city, name in country_of.items()]
    for row, landmarks in _LANDMARK_ROWS.items():
        city = row.removeprefix("-")
        for landmark in landmarks:
            facts.append(Fact("landmark_city", landmark, city))
            if not row.startswith("-"):
                facts.append(Fact("landmark_country", landmark, country_of[city]))
    return facts


FACTS = _build_facts()


def state(phrasing: str, subject: str) -> str:
    """Fill ``subject`` into ``phrasing``; a sentence starts with a capital letter ("The Eiffel Tower is")."""
    sentence = phrasing.format(s=subject)
    return sentence[0].upper() + sentence[1:]


def held_out_phrasing(fact: Fact) -> str:
    """The phrasing in which ``fact`` is never written in the training text."""
    phrasings = [p for p in PHRASINGS[fact.relation] if state(p, fact.subject) not in PUBLISHED_PROMPTS]
    return phrasings[zlib.crc32(f"{fact.relation}/{fact.subject}".encode()) % len(phrasings)]


def training_phrasings(fact: Fact) -> list[str]:
    """All phrasings of the relation except the held-out one."""
    held_out = held_out_phrasing(fact)
    return [p for p in PHRASINGS[fact.relation] if p != held_out]
