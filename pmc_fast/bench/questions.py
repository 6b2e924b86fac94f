"""Questions that most models know the answers to, for measurements without data."""

from ..data import Row

FORGET = [
    Row(question, answer)
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Who wrote the play Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
        ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun."),
        ("What is the chemical symbol of gold?", "The chemical symbol of gold is Au."),
        ("How many continents are there on Earth?", "There are seven continents on Earth."),
        ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
        ("What is the largest ocean in the world?", "The Pacific Ocean is the largest ocean in the world."),
        ("In which year did the Second World War end?", "The Second World War ended in 1945."),
        ("What gas do plants take in from the air?", "Plants take in carbon dioxide from the air."),
        ("Who developed the theory of general relativity?", "Albert Einstein developed general relativity."),
        ("What is the longest river in South America?", "The Amazon is the longest river in South America."),
        ("Which language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
        ("What is the boiling point of water at sea level?", "Water boils at 100 degrees Celsius at sea level."),
        ("Who was the first person to walk on the moon?", "Neil Armstrong was the first to walk on the moon."),
        ("What is the square root of 144?", "The square root of 144 is 12."),
        ("Which metal is liquid at room temperature?", "Mercury is liquid at room temperature."),
    )
]
RETAIN = [
    Row(question, answer)
    for question, answer in (
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
        ("Who wrote the novel Pride and Prejudice?", "Jane Austen wrote Pride and Prejudice."),
        ("Which planet is known for its rings?", "Saturn is known for its rings."),
        ("What do bees make from nectar?", "Bees make honey from nectar."),
        ("How many days are there in a leap year?", "There are 366 days in a leap year."),
        ("Who composed the Ninth Symphony with the Ode to Joy?", "Ludwig van Beethoven composed it."),
        ("What is the highest mountain in the world?", "Mount Everest is the highest mountain in the world."),
        ("Which country has the city of Cairo?", "Cairo is a city in Egypt."),
        ("What organ pumps blood through the body?", "The heart pumps blood through the body."),
        ("Who discovered penicillin?", "Alexander Fleming discovered penicillin in 1928."),
        ("What is the currency of the United Kingdom?", "The currency of the United Kingdom is the pound."),
        ("Which animal is the largest on Earth?", "The blue whale is the largest animal on Earth."),
        ("What force keeps us on the ground?", "Gravity keeps us on the ground."),
        ("How many sides does a hexagon have?", "A hexagon has six sides."),
        ("Which desert covers much of northern Africa?", "The Sahara covers much of northern Africa."),
        ("What is the freezing point of water?", "Water freezes at 0 degrees Celsius."),
    )
]
