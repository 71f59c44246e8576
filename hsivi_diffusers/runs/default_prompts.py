"""Prompts to start from: 3,000 of them, made by a seeded grammar from word lists of our own.

A grammar has lines `name: option | option | ...`, continued by indented lines, and an option may name others, as in
"{photo} of {subject}". Each kind of subject has a grammar, of which the lines come before those of `COMMON`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache

COUNT = 3000
SEED = 2310
FEWEST_WORDS, MOST_WORDS = 3, 40  # of a prompt; 40 are within the 77 tokens of CLIP
REPEATED = {"the", "and", "with", "from", "for", "over", "into", "its", "one", "two", "out", "left", "right"}

COMMON = """
prompt: {short} | {short} | {short} | {middle} | {middle} | {middle} | {long} | {long}
short: {subject} | {bare} | {subject}, {light} | {photo} of {subject} | a {photo} of {subject} | {picture} of {subject}
    | {bare}, {picture} | {bare}, {mood} | {subject}, {view} | {shot} of {subject} | ^{clause} | ^{clause}
    | {bare}, {photo}
middle: {photo} of {subject}, {light} | a {photo} of {subject}, {light}, {lens} | {bare}, {photo}, {light}, {lens}
    | {picture} of {subject}, {palette} | a {picture} of {subject}, {mood} | {bare}, {picture}, {palette}, {mood}
    | {shot} of {subject}, {light} | {subject}, {view}, {palette} | ^a {picture} of {subject} in {palette}
    | {bare}, {light}, {view}, {polish} | {picture}, {bare}, {palette} | ^{clause}, {detail} | ^{clause}. {light}
    | {subject}, {detail}, {light} | {photo}: {subject}, {detail} | {subject} as a {picture}
    | {bare}, {detail}, {picture} | ^{clause}. {light}, {view} | {subject} with {detail}, {picture}
long: ^a {photo} of {subject}, {detail}. {light}, {lens} | ^{clause}, {detail}. {light}, {mood}, {view}
    | ^a {picture} of {subject}, {detail}. {palette}, {mood}, {view}
    | {bare}, {detail}, {light}, {view}, {lens}, {polish}
    | {picture} of {subject}, {detail}, {palette}, {mood}, {polish} | ^{shot} of {subject}, {detail}. {mood}, {light}
    | ^{clause}. the mood is {feeling}, the colors are {tones}, and the light is {shining}. {view}, {detail}
    | ^in this {picture}, we see {subject}, {detail}. {palette}, {view}
    | {bare}, {picture}, {detail}, {light}, {palette}
    | ^a {photo} that shows {subject}, with {detail} and {detail}. {light}, {view}, {lens}, {polish}
    | ^a {adjective}, {feeling} {picture} of {subject}, with {detail} and {detail}. the colors are {tones}, the light is
    {shining}, and {closing}
    | ^{clause}, with {detail} and {detail}. {view}, {light}, {palette}, {mood}, {polish}
clause: {subject}
photo: photo | photograph | film photo | 35mm photograph | black and white photo | candid photo | cinematic still
    | Polaroid photo | professional photograph | analog photo | documentary photograph | vintage photograph
picture: oil painting | watercolor painting | gouache painting | acrylic painting | pastel drawing | pencil sketch
    | charcoal drawing | ink drawing | pen and ink illustration | woodcut print | linocut print | screen print
    | impressionist painting | surrealist painting | digital painting | digital illustration | flat vector illustration
    | children's book illustration | comic book panel | anime illustration | anime film still | 3D render
    | low-poly render | isometric 3D render | claymation scene | paper cut-out | felt diorama | stained-glass window
    | mosaic | pixel art scene | voxel art scene | minimalist line drawing | colored pencil drawing
    | ukiyo-e woodblock print | art deco illustration | art nouveau illustration | cross-stitch | chalk drawing
    | risograph print | storybook painting | mixed-media collage | fresco | retro travel illustration
    | cel-shaded render | concept art painting | crayon drawing
shot: a close-up | a wide shot | a low-angle shot | a medium shot | an overhead shot | a side view | a detailed view
light: soft morning light | golden hour | overcast light | late afternoon sun | dramatic side light | soft shadows
    | strong backlight | diffused daylight | blue hour | dappled light | moody lighting | warm evening light
    | long shadows | cinematic lighting | hazy sunlight | high-contrast light | gentle light from the left
    | volumetric light
shining: soft | warm | low and golden | cold and even | harsh | dim | bright | gentle
view: close-up | wide shot | low angle | high angle | side view | centered composition | symmetrical composition
    | rule of thirds | plenty of empty space around it | eye level | off-center framing | tight crop | full view
    | diagonal composition | layered foreground and background
lens: 35mm lens | 50mm lens | 85mm lens | shallow depth of field | film grain | sharp focus | medium format
    | wide-angle lens | telephoto lens | fine detail | muted film colors
palette: muted colors | a pastel palette | a limited palette | vivid colors | earth tones | warm colors | cool colors
    | black and white | shades of blue | red and gold | teal and orange | soft pinks and greens | deep greens
    | ochre and brown | high contrast | faded colors | bright primary colors | lavender and gray
tones: muted | pale | vivid | warm | cool | earthy | faded | bold | deep
mood: peaceful mood | quiet atmosphere | cheerful mood | nostalgic mood | mysterious atmosphere | dreamlike | cozy
    | melancholic mood | playful | serene | dramatic | whimsical | tense atmosphere | timeless
feeling: peaceful | quiet | cheerful | nostalgic | mysterious | melancholic | playful | serene | solemn
adjective: detailed | small | large | simple | careful | delicate | skilful | loose
closing: nothing distracts from the subject | the edges fade into white | much of the surface is left empty
    | the brightest spot is near the center | every shape is clear | the horizon is hidden | only a few tones are used
polish: highly detailed | intricate detail | award-winning | 4k | simple and clean | high resolution | crisp
    | realistic textures | elegant
color: red | blue | yellow | green | white | black | orange | pink | purple | turquoise | brown | gray
"""

PEOPLE = """
subject: {person} {doing} | {person} {doing} | {person} {doing} | {person} {doing} | {worker} | {worker}
    | {child} {playing} | {child} {playing} | {group}
clause: {person} is {doing} | {child} is {playing} | {person} {doing} | {worker}
person: {man} | {woman} | {man} {beard} | {woman} {hair} | {nation} {role} | {man} in {garment} | {woman} in {garment}
man: an old man | a young man | a middle-aged man | a tall man | a grandfather | a man in his thirties
woman: an elderly woman | a young woman | a middle-aged woman | a woman in her thirties | a tall woman | a grandmother
beard: with a gray beard | with curly hair | with a mustache | with glasses | with a shaved head | with dreadlocks
hair: with curly hair | with short silver hair | with long braids | with freckles | with glasses | with a red headscarf
nation: a Japanese | a Kenyan | a Mexican | a Norwegian | an Indian | a Moroccan | a Peruvian | a Korean | an Italian
    | a Nigerian | a Vietnamese | a Turkish | a Brazilian | an Ethiopian | an Irish | a Mongolian | a Polish | a Samoan
role: man | woman | student | farmer | musician | grandmother | traveler
garment: a yellow raincoat | a wool sweater | a linen shirt | a denim jacket | a long green coat | a straw hat
    | a velvet suit | a checkered apron | a knitted scarf | blue overalls | a white turtleneck | a patterned shirt
doing: reading a newspaper on a park bench | playing the cello in an empty hall | watering tomatoes on a balcony
    | repairing a bicycle | waiting at a bus stop | drinking coffee by a window | walking a dog along the beach
    | hanging laundry on a line | dancing alone in a kitchen | playing chess in a park | carrying a basket of oranges
    | writing a letter at a wooden desk | looking out of a train window | painting at an easel | picking apples
    | cycling through a village | sleeping in a hammock | kneading dough | hiking along a mountain ridge
    | rowing a small boat across a lake | playing the accordion on a street corner | feeding pigeons in a square
    | knitting in an armchair | standing in a doorway | climbing a steep staircase | browsing in a record shop
    | doing yoga on a rooftop | pushing a cart through a market | planting seedlings | sketching in a museum
    | holding a bunch of sunflowers | stirring a pot of soup | leaning against a brick wall
    | peeling potatoes on a doorstep | talking on an old telephone | trying on hats in front of a mirror
    | tuning an old piano | looking through a telescope | jogging along a canal | folding paper cranes
    | walking through a museum | singing into a vintage microphone | choosing flowers at a market stall
    | warming both hands on a mug of tea | sitting on a pile of suitcases | fishing from a wooden pier
    | laughing at a kitchen table | reading in a library | eating noodles | baking bread | standing in a wheat field
    | lying in tall grass | riding a horse through shallow water | listening to the radio
worker: a baker dusting loaves with flour | a blacksmith hammering glowing iron | a violin maker carving a scroll
    | a beekeeper lifting a frame of honeycomb | a potter shaping a bowl on a wheel | a nurse resting in a corridor
    | a chef plating a dessert | a fisherman mending a net on the quay | a welder in a shower of sparks
    | a ballet dancer tying a shoe | an astronaut floating beside a window | a firefighter drinking water
    | a tailor measuring a sleeve | a glassblower turning a molten vase | a shepherd with a flock on a hill
    | a mechanic under an old truck | a street musician with a trumpet | a scientist looking into a microscope
    | a librarian on a rolling ladder | a carpenter planing a board | a cyclist on a muddy track
    | a surgeon washing hands | a conductor in front of an orchestra | a boxer wrapping tape around a fist
    | a pilot in an open cockpit | a clown removing makeup | a diver adjusting a brass helmet
    | a barista pouring milk into a cup | a cellist on a dark stage | a teacher at a blackboard
    | a gardener pruning roses | a sailor coiling a rope | a weaver at a wooden loom | a skateboarder in midair
    | a climber on an overhanging cliff | a florist tying a bouquet
child: a little girl | a little boy | a girl in a raincoat | a boy with freckles | a girl with two braids
    | a small child | a boy in a wool hat | a girl in a paper crown | a boy in rubber boots | a girl with glasses
playing: flying a kite on the beach | blowing soap bubbles | building a sandcastle | climbing a tree
    | feeding ducks at a pond | jumping over a puddle | drawing with chalk on the pavement | hugging a puppy
    | running through a sprinkler | riding a wooden rocking horse | sledding down a hill | eating a melting ice cream
    | holding a red balloon | looking at a snail | reading under a blanket | stacking wooden blocks
    | sitting on a tire swing | painting with both hands | listening to a seashell | hiding behind a curtain
    | playing with a toy train
group: two friends laughing over coffee | a family around a dinner table | commuters on a train platform
    | a jazz quartet on a small stage | four old men playing cards | children racing bicycles down a lane
    | a couple dancing in the street | a crowd watching a street performer | three women gossiping on a bench
    | a choir in a stone church | two fencers facing each other | hikers resting around a campfire
    | a wedding party in a garden | rowers in a long boat | a football team in the rain
    | neighbors sharing a meal outdoors | two chess players in deep thought | dancers rehearsing in a studio
    | farmers harvesting rice by hand
photo: photo | candid photo | documentary photograph | black and white photo | 35mm photograph | film photo
    | cinematic still | editorial photograph | Polaroid photo | photograph | snapshot
shot: a close-up | a wide shot | a low-angle shot | a medium shot | a side view | a detailed view
detail: hands in focus | a blurred background | half of the scene in shadow | a small dog nearby | dust in the air
    | movement at the edges | deep concentration | a splash of red in the clothes | a long shadow to one side
    | everything behind out of focus | tired but happy eyes | worn shoes | strong shapes in the background
view: close-up | waist-up | full body | seen from behind | low angle | eye level | high angle | in profile
    | off-center framing | centered composition | rule of thirds | tight crop
closing: nothing distracts from the person | the edges fade into white | the brightest spot is near the center
    | every shape is clear | the hands are the sharpest part | the background is only hinted at
    | only a few tones are used
"""

PORTRAITS = """
subject: {anyone} | {sitter} with {expression} | {known} with {expression} | {sitter} wearing {garment}
    | {sitter} wearing {garment}, {expression} | {anyone}
anyone: {sitter} | {known}
sitter: an old fisherman | a young woman with curly red hair | a man with a long gray beard
    | a teenage girl with freckles | a grandmother with deep wrinkles | a boy with a gap between the teeth
    | a woman with short silver hair | a man with round glasses | a girl with two braids | a man with dreadlocks
    | a jazz trumpeter | a woman with vitiligo | a farmer with sunburned cheeks | a retired boxer | a circus performer
    | a tall Senegalese man | a Korean grandmother | a Finnish teenager | a young Peruvian woman | an Iranian poet
    | a Cuban dancer
known: a miner with a dirty face | an opera singer in costume | a ballerina | a young monk
    | a woman in a blue headscarf | a punk with a green mohawk | a Sikh man in an orange turban
    | an Inuit hunter in furs | a Maasai woman | a sea captain | a knight in armor | a queen in a lace collar
    | an android with a porcelain face | an elf archer | a pirate | a samurai | a deep-sea diver
    | an astronaut without a helmet | a beekeeper with the veil lifted
expression: a slight smile | a serious expression | closed eyes | a raised eyebrow | a thoughtful look | a broad grin
    | tired eyes | a calm gaze | a surprised look | a distant look | a proud expression
garment: a yellow raincoat | a wool sweater | a linen shirt | a fur-lined hood | a velvet cloak | a straw hat
    | a silk scarf | a leather apron | a woolen cap | a flower crown | a patchwork jacket | a black turtleneck
photo: portrait | close-up portrait | studio portrait | black and white portrait | environmental portrait | headshot
    | Polaroid portrait | film portrait | portrait photograph
picture: portrait in oils | watercolor portrait | charcoal portrait | pencil portrait | ink portrait | pastel portrait
    | anime portrait | pixel art portrait | Renaissance portrait | Baroque portrait | art nouveau portrait
    | 3D portrait | cubist portrait | comic book portrait | linocut portrait | digital portrait | caricature
    | gouache portrait | mosaic portrait | expressionist portrait | pop art portrait | miniature portrait
shot: a close-up | a profile view | a three-quarter view | a low-angle shot | a tight shot
light: studio lighting | softbox lighting | window light from one side | Rembrandt lighting | rim light | soft light
    | candlelight | hard light and deep shadows | golden hour | overcast light | neon light on one side | backlight
view: close-up | head and shoulders | in profile | three-quarter view | eye level | looking straight at the viewer
    | looking away | plain gray background | dark background | centered composition | tight crop
    | soft green background
detail: fine lines around the eyes | strands of hair across the forehead
    | drops of water on the skin | a faint scar on the chin | a small bird on one shoulder | a hand under the chin
    | dust on the shoulders | the background lost in darkness | a streak of paint on one cheek | a cat held close
mood: quiet atmosphere | dramatic | intimate | timeless | dignified | melancholic mood | warm atmosphere
lens: 50mm lens | 85mm lens | 105mm lens | shallow depth of field | film grain | sharp focus | medium format
    | fine detail
closing: nothing distracts from the face | the edges fade into white | the brightest spot is near the eyes
    | the background is left plain | only a few tones are used
"""

WILDLIFE = """
subject: {northern} {act} {north} | {northern} {act} {north} | {northern} {north} | {southern} {act} {south}
    | {southern} {south} | {tropical} {act} {tropics} | {tropical} {tropics} | {animal} {act} | {pair}
clause: {northern} is {act} {north} | {southern} is {act} {south} | {tropical} is {act} {tropics} | {animal} is {act}
animal: {northern} | {southern} | {tropical}
northern: a red fox | a brown bear | a gray wolf | a lynx | a wild boar | a hedgehog | a badger | a roe deer | a moose
    | a mountain goat | a bison | a raccoon | an otter | a beaver | a hare | a fox cub | a bear cub | a fawn
    | a squirrel | a white stag | a musk ox | a pine marten | a stoat | a reindeer | an ibex | a wolverine
southern: an elephant | a giraffe | a lion | a lioness | a leopard | a zebra | a rhinoceros | a camel | a kangaroo
    | a baby elephant | a hippopotamus | a porcupine | a meerkat | an antelope | a warthog | a hyena | an aardvark
    | a cheetah | a wild dog
tropical: a tiger | an orangutan | a gorilla | a sloth | an anteater | a jaguar | a chameleon | a tree frog
    | a red panda | a giant panda | an iguana | a lemur | a tapir | a capuchin monkey | an armadillo | a koala
    | a cassowary
act: standing still | looking back | looking straight at the camera | resting | sleeping | yawning | hiding | eating
    | stretching | waking up
north: in a forest clearing | among ferns | in fresh snow | by a river | on a rocky slope | in the rain
    | under an old tree | at the edge of a pond | in morning mist | in a meadow | beside a fallen log
    | between boulders | in autumn leaves
south: in tall grass | at a waterhole | on a dusty plain | under an acacia tree | on red earth | in the midday heat
    | in front of a distant mountain | at the edge of a dry river | in golden grass
tropics: in the rainforest | on a mossy branch | among broad leaves | in a bamboo grove | beside a stream
    | in light rain | on a thick vine | in dense green shade
pair: two foxes playing in the snow | a herd of wild horses crossing a river | two giraffes with crossed necks
    | a mother bear with two cubs | a pack of wolves on a frozen lake | an elephant herd at a waterhole
    | a colony of seals on a beach | deer at the edge of a wood | a cheetah chasing a gazelle
    | a polar bear on an ice floe | two hares boxing in a field | a family of otters on their backs
    | a snow leopard on a ledge | monkeys in a hot spring
photo: wildlife photo | nature photograph | photo | telephoto shot | black and white photo | film photo | photograph
detail: every hair in focus | a blurred background | insects dancing in the light | ears turned to a sound
    | a curious look | soft colors behind | a bird flying off | mud on the legs | leaves in the foreground
view: close-up | full body | side view | eye level | low angle | seen from far away | small in a wide landscape
    | head and shoulders | rule of thirds | framed by leaves | tight crop | from behind
closing: nothing distracts from the animal | the edges fade into white | every shape is clear
    | only a few tones are used | the eyes are the sharpest part
"""

BIRDS = """
subject: {small} {perch} | {small} {perch} | {wader} {shallows} | {wader} {shallows} | {hunter} {height} | {other}
    | {flock}
clause: {small} sits {perch} | {wader} stands {shallows} | {hunter} sits {height} | {flock}
small: a robin | a kingfisher | a raven | a sparrow | a woodpecker | a magpie | a hoopoe | a wren | a goldfinch
    | a blue tit | a nightingale | a swallow | a bluebird | a cardinal | a crow | a bullfinch | a dove | a blackbird
perch: on a mossy branch | on a fence post | on a stone wall | on a rusty gate | on a snowy twig | on a windowsill
    | on a thorny branch | on a clothesline | on a garden fork | among red berries | on a weathered sign without words
wader: a gray heron | a pelican | a flamingo | a crane | a white swan | a mallard | a stork | an egret | a goose
    | an ibis
shallows: in shallow water | among reeds | on one leg | in morning mist | on a calm lake | at the edge of a pond
    | with spread wings | in the rain | beside its nest
hunter: a barn owl | a golden eagle | a snowy owl | a falcon | a buzzard | a condor | a tawny owl | a red kite
height: on a bare tree | on a rocky ledge | on an old barn | against a pale sky | on a tall pine | in falling snow
    | on a gloved hand
other: a hummingbird at a red flower | a peacock with its tail spread | a toucan in the rainforest
    | a cockatoo on a perch | a blue macaw among leaves | a puffin with fish in its beak | a rooster on a dung heap
    | an emu in dry grass | an ostrich running | an emperor penguin with its chick | a pair of lovebirds
    | a gull on a mooring post
flock: starlings swirl over a field | penguins stand on an ice shelf | swans glide across a misty lake
    | three owls sit on a branch | geese fly over a village | pigeons take off from a square | cranes dance in the snow
    | gulls follow a fishing boat | parrots gather at a clay cliff | ducks sleep on a pond
photo: wildlife photo | nature photograph | photo | telephoto shot | black and white photo | photograph | film photo
detail: every feather in focus | a blurred background | head turned to one side | open beak | ruffled feathers
    | soft colors behind | a single feather in the air | a thin branch across the picture
view: close-up | side view | eye level | low angle | seen from far away | small in a wide landscape | rule of thirds
    | framed by leaves | tight crop | from behind | against the light
closing: nothing distracts from the bird | the edges fade into white | every shape is clear | only a few tones are used
"""

PETS = """
subject: {cat} {cat_act} {where} | {cat} {cat_act} | {dog} {dog_act} {where} | {dog} {dog_act} | {small} {small_act}
    | {pet} in {costume} | {farm} {standing} | {farm} {standing} | {pair}
clause: {cat} is {cat_act} {where} | {dog} is {dog_act} {where} | {dog} is {dog_act} | {cat} is {cat_act}
    | {farm} {standing}
pet: {cat} | {dog}
cat: a tabby cat | a black cat | a white cat with green eyes | an orange kitten | a Siamese cat | a fluffy gray cat
    | a calico cat | a hairless cat | an old ginger cat
dog: a border collie | a golden retriever puppy | a dachshund | a corgi | a pug | a greyhound | an old sheepdog
    | a Dalmatian | a husky with blue eyes | a small brown dog | a three-legged dog | a poodle | a wet terrier
small: a guinea pig | a hamster | a lop-eared rabbit | a white rabbit | a ferret | a pet tortoise | a green budgie
small_act: eating a leaf | on a stack of books | in a straw hat | on a patchwork quilt | inside a teacup
    | beside a carrot | in a flower bed | in front of a tiny house | in a cardboard box
cat_act: sleeping | yawning | looking up | playing with a ball of yarn | licking a paw | staring at a fly
    | sitting upright | stretching | lying on its back
dog_act: sleeping | yawning | looking up | waiting | chewing a stick | tilting its head | looking guilty
    | lying on its back | sitting upright | sticking out its tongue
where: on a windowsill | on a striped sofa | in a laundry basket | on a doorstep | on an old rug | under a table
    | on a wooden floor | in front of a fireplace | on a pile of pillows | in a garden | on a balcony | on a bed
costume: a knitted sweater | a wizard hat | a tiny bow tie | a yellow raincoat | a space suit | a chef's hat
    | a detective's coat | round glasses | a red bandana | a pirate hat
farm: a brown cow | a white goat | a donkey | a black sheep | a piglet | a gray horse | a hen with chicks | a turkey
    | an alpaca | a Shetland pony | a calf | a newborn lamb | a goose | a llama
standing: in a muddy yard | behind a wooden gate | in a green pasture | under an apple tree | in an old barn
    | in front of a red tractor | on a dirt road | on a hillside | looking over a fence
pair: a cat and a dog asleep on one bed | two kittens in a teacup | three puppies in a basket
    | a cat watching a goldfish | a dog and a duckling in the grass | two horses nuzzling
    | a kitten riding on a tortoise | five ducklings in a row | a dog with its head out of a car window
    | a cat sitting between flower pots | a rabbit next to a pile of carrots
photo: photo | snapshot | candid photo | studio photo | film photo | photograph | close-up photo | phone photo
shot: a close-up | a low-angle shot | an overhead shot | a side view | a medium shot
detail: one ear folded | crumbs all around | a toy mouse in front | fur glowing at the edges | a shadow on the wall
    | a curious look | its nose in focus | plants in the background | soft colors behind | dust in the air
view: close-up | full body | from above | eye level | low angle | side view | tight crop | centered composition
mood: cozy | playful | cheerful mood | funny | quiet atmosphere | cute | peaceful mood | whimsical | warm atmosphere
closing: nothing distracts from the animal | the edges fade into white | every shape is clear
    | only a few tones are used
"""

SEA = """
subject: {creature} {swimming} | {creature} {swimming} | {creature} {swimming} | {shoal}
clause: {creature} swims {swimming} | {creature} floats {swimming} | {shoal}
creature: a humpback whale | an octopus | a sea turtle | a seahorse | a jellyfish | a manta ray | a clownfish
    | a hammerhead shark | a pufferfish | a cuttlefish | an orca | a dolphin | a lionfish | a moray eel | a koi carp
    | a narwhal | a sea lion | a giant squid | an anglerfish | a manatee | a nautilus | a sunfish | a whale shark
swimming: in clear blue water | above a coral reef | in the deep sea | among kelp | near the surface | in dark water
    | over white sand | beside a sunken ship | in an underwater cave | in green water
    | between columns of a sunken temple
shoal: silver fish turning all at once | two seahorses among seagrass | jellyfish drifting in black water
    | a coral reef full of small fish | crabs on a wet beach | dolphins leaping beside a boat | starfish in a tide pool
    | a hermit crab in a blue shell | a lobster between stones | a whale's tail above the waves
    | a diver beside a whale
photo: underwater photo | nature photograph | photo | wide-angle photograph | black and white photo
light: soft light from above | strong backlight | diffused light | rays of light | bluish light
    | a single beam of light | glowing light
shot: a close-up | a wide shot | a side view | a detailed view | a view from below
detail: tiny bubbles rising | small fish all around | sand drifting up | a diver far away | fine patterns on the skin
    | colors that shimmer | darkness below | a faint reflection
view: close-up | wide view | side view | centered composition | filling the frame | rule of thirds
    | small against a large background | seen from below
closing: nothing distracts from the animal | the edges fade into darkness | every shape is clear
    | only a few tones are used
"""

INSECTS = """
subject: {insect} {on} | {insect} {on} | {insect} {on} | {insects}
clause: {insect} rests {on} | {insect} climbs {on} | {insects}
insect: a dragonfly | a ladybug | a monarch butterfly | a bumblebee | a praying mantis | a jumping spider | a snail
    | a green beetle | a moth | a grasshopper | a caterpillar | an ant | a stick insect | a cicada | a lacewing
    | a wasp | a stag beetle | a damselfly
on: on a blade of grass | on a thistle | on a wet leaf | on a lavender stem | on a mushroom | on a piece of bark
    | on a white petal | on a twig | on a sunflower | on a pebble | on a fingertip | on a rusty nail | on a window pane
insects: ants carrying a leaf | bees at the entrance of a hive | butterflies on a muddy bank | fireflies above a meadow
    | a spider web covered in dew | two snails on a garden wall | moths around a lamp | a butterfly leaving its cocoon
    | water striders on a pond
photo: macro photo | close-up photo | nature photograph | photo | detailed photograph
light: soft light from above | dappled light | strong backlight | diffused light | side light | morning light
    | bright even light | warm light
shot: a close-up | a side view | a detailed view | a view from above
detail: every tiny hair visible | drops of water all around | a blurred green background | fine patterns in sharp focus
    | colors that shimmer | delicate texture | a faint reflection | pollen in the air
view: close-up | side view | from above | extreme close-up | centered composition | filling the frame | rule of thirds
    | small against a large background
lens: 100mm macro lens | shallow depth of field | sharp focus | fine detail | film grain
closing: nothing distracts from the subject | the edges fade into white | every shape is clear
    | only a few tones are used
"""

LANDSCAPES = """
subject: {green} | {green} {season} | {green} {weather} | {green} with {sight} | {green} {weather} | {cold}
    | {cold} {frost} | {hot} | {hot} {heat} | {feature} {setting} | {feature} {setting} | {feature} {setting}
clause: {feature} stands {setting} | {green} {weather} | {green} with {sight} | {hot} {heat} | {cold} {frost}
green: a pine forest | a mountain lake | a rocky coast | a birch forest | a wide river delta | a moor with heather
    | a canal | a vineyard on a hillside | a wheat field | an alpine meadow | a beech wood | a country road
    | a winding river | a cherry orchard | a peat bog | a quiet bay | a tulip field | a stony riverbed | a chalk cliff
    | a village green | a fern-covered gorge | a hedgerow between fields | a reed-lined pond | a forest path
cold: a glacier valley | a frozen lake | a fjord | a chain of snowy peaks | a tundra | an ice cave | an icy black beach
    | a snow-covered forest | a sea of clouds below a summit | an iceberg | a frozen waterfall
hot: a desert of red dunes | a tropical beach | a volcanic island | a canyon | a salt flat | a bamboo grove
    | a rainforest | a mangrove swamp | a savanna | an olive grove | a terraced rice field | a hot spring
    | a waterfall in the jungle | an oasis with palm trees | a coral atoll | a lava field | a lavender field
season: in early spring | in autumn | in deep winter | in midsummer | at the first snow | in October
weather: under a stormy sky | in thick fog | after the rain | under a clear sky | at sunrise | at sunset | at dusk
    | at dawn | in a snowstorm | under a full moon | under a starry sky | in light rain | under low clouds
    | with lightning in the distance | under a rainbow
frost: under the northern lights | at dusk | in a snowstorm | under a pale sky | at sunrise | under a full moon
    | in thick fog
heat: in the midday heat | at sunset | under a stormy sky | at dawn | under a starry sky | after heavy rain
    | in the haze
sight: a lone tree | a wooden hut | a small boat | a stone bridge | a distant village | a single hiker | a ruined tower
    | a broken fence | a flock of birds | a campfire | a scarecrow
feature: a lone oak | a lighthouse | a wooden cabin | a windmill | a stone circle | a dead tree | a red barn | a chapel
    | a shepherd's hut | a row of poplars | a stone tower | a small white house | a tent | a water mill
setting: on a green hill | on a cliff above the sea | at the edge of a lake | in a snowy field | in a foggy valley
    | in a wide plain | on a small island | beside a gravel road | in a field of poppies | at the foot of a mountain
    | between two hills | under a huge sky
photo: landscape photo | aerial photo | drone photo | long exposure photo | photo | panoramic photo | film photo
    | black and white photo | travel photograph
light: golden hour | soft morning light | blue hour | overcast light | rays of sun through clouds | hazy light
    | low winter sun | long shadows | dramatic light | moonlight | pale light | last light of the day
shot: a wide shot | an aerial view | a bird's-eye view | a panoramic view | a distant view | a low-angle shot
detail: mist near the ground | distant hills fading into blue | nobody in sight | a few birds high above | a thin haze
    | rough texture in the foreground | a touch of warm color far away | a narrow path | deep shade at one side
view: wide view | panorama | from above | low horizon | high horizon | leading lines | layers of depth | rule of thirds
    | framed by branches | symmetrical composition | plenty of sky
lens: 24mm lens | 35mm lens | wide-angle lens | film grain | sharp focus | medium format | fine detail | telephoto lens
closing: the horizon is low | the edges fade into white | the eye is led into the distance | every shape is clear
    | only a few tones are used | the sky takes up most of the picture
"""

CITIES = """
subject: {scene} | {scene} {weather} | {scene} {weather} | {building} {setting} | {building} {setting} | {building}
clause: {building} stands {setting} | {scene} {weather}
scene: a narrow alley with laundry lines | a busy market | a crosswalk full of umbrellas | a canal with houseboats
    | a tram on a steep street | a square with a fountain | a harbor with fishing boats | a rooftop garden
    | a row of colorful townhouses | a bridge over a wide river | a street of cafes | a treehouse in a big oak
    | a city skyline | a suburban street | a medieval town on a hill | a stilt house over shallow water
    | a courtyard with orange trees | a stairway between old houses | a bus stop | a street corner with a newsstand
    | an ornate city gate | a train yard | a promenade by the sea | a factory district
    | a playground between tower blocks | a village main street | a gas station beside a highway
    | an abandoned amusement park | a construction site | a suspension bridge | an old cemetery
    | a street with cherry trees
weather: in the rain | at night | at dawn | at dusk | in the snow | in summer | in autumn | after a storm | in the fog
    | on a Sunday morning | at blue hour | under a pale sky | in bright sun
building: a Gothic cathedral | a brutalist apartment block | a glass skyscraper | a timber-framed house | a pagoda
    | a mosque with blue tiles | a Victorian greenhouse | an art deco cinema | a white chapel | a red brick factory
    | a concert hall with a curved roof | a castle | an adobe house | a modern villa with a pool
    | an old railway station | a water tower | a stone farmhouse | a wooden stave church | a Baroque palace | a diner
    | an abandoned hotel | a tiny house | a library with tall columns | a concrete museum | a Japanese teahouse
    | a ruined abbey | an observatory | a windowless warehouse | a bell tower | a synagogue | a Hindu temple
setting: on a hill | at the end of a street | in a dense forest | by a lake | in the snow | on a foggy morning
    | reflected in a puddle | at night with lit windows | across a river | behind bare trees | in a quiet suburb
    | on a rocky island | under a cloudy sky | in the desert | between taller buildings
photo: street photo | architectural photo | photo | night photo | drone photo | black and white photo | film photo
    | travel photograph | long exposure photo | photograph
picture: {sketch} | {sketch} | oil painting | watercolor painting | gouache painting | pencil sketch | ink drawing
    | digital painting | flat vector illustration | anime background | pixel art scene | isometric illustration
    | 3D render | voxel model | low-poly render | linocut print | paper model | retro travel illustration
    | impressionist painting | matchbox diorama | concept art painting | comic book panel | screen print
    | pastel drawing | ukiyo-e woodblock print
sketch: architectural sketch | blueprint drawing | pen and ink drawing | urban sketch | technical line drawing
detail: wet ground | long shadows | a few people passing | pigeons in the air | peeling paint | lamps just lit
    | a stray cat | a bicycle leaning on a wall | repeating shapes | ivy on one side | nobody around
    | a single lit window
view: wide shot | street level | from above | low angle | symmetrical composition | one-point perspective
    | frontal view | strong vertical lines | seen from a window | framed by an arch | bird's-eye view | corner view
lens: 24mm lens | 35mm lens | wide-angle lens | film grain | sharp focus | tilt-shift lens | medium format
    | fine detail
closing: every line is straight | the edges fade into white | the eye is led into the distance | every shape is clear
    | only a few tones are used | the sky is left empty
"""

ROOMS = """
subject: {home} | {home} with {thing} | {home} with {thing} and {other} | {home} in {style} style | {home} {time}
    | {room}
    | {room} | {room} {time}
home: a small kitchen | a sunlit living room | an attic bedroom | an artist's studio | a reading nook
    | a brick-walled loft | a log cabin | a student's room | a summer house | a quiet study | a dining room
    | a writer's room | a houseboat cabin
room: a library with a spiral staircase | a tiled bathroom | a greenhouse full of ferns | a barbershop | a record shop
    | a hotel lobby | an empty classroom | a workshop full of tools | a child's bedroom with a tent | a wine cellar
    | an old train compartment | a laundromat with yellow machines | a ballroom with chandeliers | an old pharmacy
    | a ramen bar | a recording studio | a hallway with many doors | a bakery before opening | a conservatory
    | a spaceship cabin | a throne room | a watchmaker's shop | a tea room | an indoor swimming pool | an empty theater
    | a subway station | an empty parking garage | a botanist's laboratory | a submarine control room | a chess club
    | a bowling alley
thing: a worn leather armchair | a round wooden table | a wall of books | a wood stove | a tall window | a piano
    | hanging plants | a patterned rug | a skylight | mismatched chairs | a velvet sofa | a brass lamp
    | a checkered floor | a large mirror | a drafting table
other: white curtains | a sleeping cat | a vase of tulips | a ceiling fan | green walls | paper lanterns
    | a bowl of lemons | an open door | old maps on the wall | a globe | a ladder | red cushions
style: mid-century modern | Scandinavian | art deco | industrial | minimalist Japanese | rustic | 1970s | Moroccan
    | bohemian | Victorian | futuristic
time: early in the morning | on a rainy day | at night | in winter | in the afternoon
photo: interior photo | photo | editorial photograph | film photo | wide-angle photo | architectural photo
picture: watercolor painting | oil painting | gouache painting | isometric 3D render | isometric illustration
    | 3D render | pencil sketch | ink drawing | anime background | pixel art scene | digital painting
    | storybook painting | dollhouse diorama | flat vector illustration | voxel model | colored pencil drawing
    | low-poly render | stage design
shot: a wide shot | a corner view | an overhead view | a view through the door | a detailed view
light: window light | warm lamplight | soft daylight | rays of sun on the floor | candlelight | neon light | dim light
    | late afternoon sun | pale light | firelight
detail: shadows on the wall | a half-finished cup of tea | scuffed floorboards | a coat over a chair | nobody there
    | plants in every corner | a radio playing | a letter left open | dust in the air | one chair knocked over
view: wide shot | symmetrical composition | corner view | eye level | from above | frontal view
    | seen through a doorway | one-point perspective | low angle
lens: 24mm lens | wide-angle lens | sharp focus | film grain | medium format | fine detail | soft focus
closing: every object has its place | the edges fade into white | the eye is led to the back wall
    | every shape is clear | only a few tones are used
"""

FOOD = """
subject: {dish} {served} | {dish} {served} | {dish} with {topping} | {dish} | {bake} {cooling} | {drink} {standing}
    | {fruit} {lying} | {fruit} {lying}
clause: {dish} {served} | {drink} {standing} | {fruit} {lying} | {bake} {cooling}
dish: a bowl of ramen | a stack of pancakes | a wood-fired pizza | a plate of oysters | a cheese board
    | a bowl of pumpkin soup | a plate of dumplings | a burger | a seafood paella | a bento box | a pot of mussels
    | a plate of spaghetti | a bowl of fruit salad | a breakfast tray | a plate of tacos | a bowl of bibimbap
    | a vegetable curry | an omelet | a Greek salad | a plate of sushi | a pan of shakshuka | a bowl of porridge
    | a grilled fish | a roast chicken | a plate of waffles | a mushroom risotto | a bowl of borscht | a bowl of pho
topping: fresh herbs | toasted seeds | a drizzle of olive oil | chopped chives | a slice of lemon | lime wedges
    | edible flowers | a sprig of mint | sea salt | black pepper
bake: a loaf of sourdough | a braided bread | a cinnamon roll | a tray of croissants | a blueberry pie | a wedding cake
    | a batch of cookies | a cupcake with pink frosting | a pretzel | an apple strudel | macarons in many colors
    | a baguette | a slice of lemon tart | a chocolate cake | a plum tart | a gingerbread house
cooling: on a cooling rack | on a wooden board | in a bakery window | on a marble counter | on a lace doily
    | on brown paper | on a cake stand | on a windowsill | in a basket
served: on a wooden table | on a blue tablecloth | on a marble counter | on newspaper | at a street stall
    | on a checkered tablecloth | on a dark table | on a picnic blanket | on a rustic table | by a window
    | on a garden table
drink: a cup of black coffee | a glass of iced tea | a cappuccino with foam art | a pitcher of lemonade
    | a mug of cocoa | a glass of red wine | a pot of green tea | a berry smoothie | a cocktail with an orange peel
    | a glass of water
standing: on a windowsill | on a cafe table | on a bar | on a wooden tray | beside an open book | on a mossy stone
    | on a silver tray | on a balcony | next to a straw hat
fruit: a halved pomegranate | three ripe figs | a bunch of grapes | a sliced grapefruit | a pile of cherries
    | a pineapple | two pears | a basket of strawberries | a cracked coconut | a bowl of lemons
    | a heap of chili peppers | a cut melon | a row of tomatoes | a bunch of radishes | a cabbage | an artichoke
    | five mushrooms | a string of garlic | an avocado | a pumpkin | an ear of corn | a peeled orange
lying: on a linen cloth | on a black background | on a wooden table | in a shaft of light | on wet slate
    | on crumpled paper | on a market stall | on a pink background | on a windowsill | on a kitchen scale
    | on a blue plate
photo: food photo | overhead photo | close-up photo | photo | magazine photo | macro photo | film photo
picture: still life in oils | watercolor painting | gouache illustration | colored pencil drawing | linocut print
    | flat vector illustration | pixel art icon | 3D render | anime illustration | pastel drawing | Baroque still life
    | cubist still life | claymation scene | ink drawing | cookbook illustration | retro illustration | felt sculpture
    | impressionist painting | low-poly render | crayon drawing | mosaic
shot: a close-up | an overhead shot | a side view | a detailed view | a tight shot
light: soft window light | hard sunlight | dark moody light | side light | bright even light | candlelight | backlight
    | morning light | studio lighting | warm light
detail: a spoon at the side | drops of water nearby | a linen napkin | a blurred background | a butter knife
    | a hand reaching in | a salt shaker behind | spices in small bowls | half of it gone
view: close-up | from above | side view | flat lay | centered composition | tight crop | off-center framing
    | 45-degree angle
mood: cozy | rustic | fresh | festive | homely | elegant | minimalist | appetizing | simple
lens: 50mm lens | 100mm macro lens | shallow depth of field | sharp focus | film grain | fine detail
closing: nothing distracts from the food | the edges fade into white | every texture is clear
    | only a few tones are used
"""

VEHICLES = """
subject: {car} {road} | {car} {road} | {boat} {water} | {train} {rail} | {flyer} {air} | {bike} {parked}
    | {bike} {parked}
clause: {car} is parked {stop} | {boat} lies {water} | {flyer} flies {air} | {bike} stands {parked} | {train} is {rail}
car: a red vintage convertible | a rusty pickup truck | a yellow school bus | a blue delivery van | a green tractor
    | a silver sports car | a black limousine | a small electric car | an old round car | a camper van | a racing car
    | a fire engine | a snowplow | an ice cream truck | a 1950s sedan | a rally car | an off-road jeep
    | a double-decker bus
road: on a coastal road | on a desert highway | on a muddy track | on a mountain pass | on a bridge | in traffic
    | {stop}
stop: in front of a diner | under a street lamp | in a snowy forest | in a narrow street | in an old garage
    | in the rain | beside a wheat field | in an empty parking lot | outside a farmhouse | by the sea
    | under a plane tree
boat: a wooden sailboat | a fishing trawler | a canoe | a container ship | a paddle steamer | a rowing boat | a gondola
    | a lifeboat | an icebreaker | a Viking longship | a yacht | a submarine at the surface | a tugboat | a raft
water: on a calm lake | in a stormy sea | in a foggy harbor | on a wide river | near a rocky shore | in still water
    | among ice floes | under a bridge | on the beach at low tide | in a turquoise lagoon
train: a steam locomotive | a high-speed train | an old tram | a freight train | a red railcar | a night train
rail: crossing a stone viaduct | leaving a tunnel | waiting at an empty platform | running beside a lake
    | crossing a bridge | passing through a forest | standing in a cloud of steam | climbing a snowy valley
    | passing a wheat field
flyer: a hot air balloon | a biplane | a zeppelin | a helicopter | a seaplane | a glider | a paper airplane | a drone
air: above the clouds | over a city | over a patchwork of fields | above a mountain lake | in a clear sky
    | in front of a huge moon | over the sea | in a stormy sky
bike: a red bicycle | a cargo bike | a vintage motorcycle | a mint-green scooter | a tandem | a child's tricycle
    | a racing bike | a sidecar motorcycle | a rickshaw | a horse-drawn carriage | a wheelbarrow
parked: next to a white wall | under a tree | in front of a bakery | beside a canal | on a cobbled street
    | in a dim garage | on a dock | covered in snow | in a courtyard | at the edge of a field
photo: photo | film photo | documentary photograph | black and white photo | vintage photograph | long exposure photo
    | photograph | magazine photo
picture: {sketch} | {sketch} | oil painting | watercolor painting | pencil sketch | ink drawing | isometric 3D render
    | 3D render | low-poly render | flat vector illustration | anime illustration | pixel art scene | linocut print
    | retro illustration | toy model | claymation scene | comic book panel | screen print | digital painting
    | art deco print
sketch: blueprint drawing | technical line drawing | cutaway drawing | patent drawing | marker rendering
shot: a wide shot | a low-angle shot | a side view | a distant view | a three-quarter view | a detailed view
detail: highlights on the metal | a long shadow below | worn paint | birds overhead | nobody around | distant hills
    | fresh scratches | a small flag | a thin line of smoke | one broken lamp
view: side view | three-quarter view | wide shot | low angle | from above | frontal view | from behind
    | small in a wide landscape | centered composition | motion blur
closing: every line is clean | the edges fade into white | the eye is led into the distance | every shape is clear
    | only a few tones are used
"""

OBJECTS = """
subject: {object} {lying} | {object} {lying} | a {color} {thing} next to {object}
    | a {color} {thing} on top of {support} | {number} {things} {arranged} | {number} {color} {things} {arranged}
    | a {color} {thing} to the left of {object} | {object} and {object} {lying} | {object} made of {material}
    | a {material} {thing} {lying} | {number} {things} and {object} | a {color} {thing} between {object} and {object}
clause: a {color} {thing} sits behind {object} | {object} lies next to {number} {things} | {object} {lying}
object: an old camera | a telescope | a pocket watch | a typewriter | a pair of boots | a stack of books
    | a tall vase | a violin | an oil lamp | a chess board | a globe | a pair of scissors | a magnifying glass
    | a rubber duck | a toy robot | a music box | a rotary telephone | an hourglass | a compass | a rusty key
    | a birdcage | a sewing machine | a teapot | a candlestick | a snow globe | a straw hat | a toy train
    | a coffee grinder | a pair of glasses | a lantern | an accordion | a seashell | a wind-up clock
    | a ship in a bottle | a bell | a feather | a bar of soap | a paintbrush in a jar | a carved mask
    | a teddy bear | a pocket radio | a microscope
thing: mug | candle | vase | book | bottle | box | cube | sphere | bowl | teapot | chair | ball | lamp | suitcase
    | umbrella | backpack | plate | bucket | pillow | toy car
support: a stack of books | a wooden crate | a piano | a folded blanket | a white pedestal | a tree stump
    | a cardboard box | an old trunk | a small table
number: two | three | four | five | six | seven
things: pencils | marbles | candles | keys | bottles | eggs | buttons | matches | coins | wooden cubes | paper boats
    | glass spheres | books | spools of thread | clothespins | tin cans | cups | lemons | dice | pebbles | apples
arranged: in a row | in a circle | in a pile | on a wooden table | on a white shelf | in a glass bowl | on a blue cloth
    | on a windowsill | on a mirror | on a plain background | in a cardboard box
material: glass | copper | knitted wool | marble | folded paper | ice | moss | carved wood | clay | steel | porcelain
    | straw
lying: on a wooden table | on a velvet cloth | on a windowsill | on a beach | on a dusty shelf | in a glass case
    | on a white background | on a stone floor | on a pile of letters | in the snow | in a shaft of light | on a piano
    | on a pink background | on a workbench | on a striped blanket
photo: product photo | still life photo | photo | studio photo | film photo | close-up photo | black and white photo
    | photograph
picture: still life in oils | watercolor painting | pencil drawing | ink drawing | etching | charcoal drawing
    | 3D render | flat vector illustration | pixel art icon | isometric icon | linocut print | technical drawing
    | pop art print | Baroque still life | cubist still life | gouache illustration | line drawing | low-poly render
    | claymation scene | retro illustration | photorealistic painting | paper collage | engraving | pastel drawing
shot: a close-up | an overhead shot | a side view | a detailed view | a tight shot
light: softbox lighting | window light | hard side light | candlelight | bright even light | dark moody light
    | rim light | soft shadows | a single spotlight | backlight | studio lighting
detail: fine scratches | a soft shadow on the right | dust in the light | a blurred background | a sheet of paper below
    | cobwebs at the edges | a faint reflection | smooth gradients behind
view: close-up | from above | side view | centered composition | flat lay | eye level | three-quarter view | tight crop
    | plenty of empty space around it
mood: quiet atmosphere | nostalgic mood | minimalist | mysterious atmosphere | elegant | playful | timeless | austere
lens: 50mm lens | 85mm lens | shallow depth of field | sharp focus | film grain | medium format | fine detail
closing: nothing distracts from the objects | the edges fade into white | every edge is clear
    | only a few tones are used
"""

PLANTS = """
subject: {flower} {growing} | {flower} {growing} | {plant} {potted} | {tree} {season} | {fungus} {ground}
    | a field of {flowers} | a bouquet of {flowers} {vase}
clause: {tree} stands {place} | {flower} grows {spot} | {plant} grows {potted} | {flower} {growing}
flower: a red poppy | a sunflower | a purple iris | a wild rose | a dandelion | a blue hydrangea | an orchid | a daisy
    | a tulip with frilled petals | a thistle | a snowdrop | a peony | a magnolia blossom | a passion flower
    | a foxglove | a lily of the valley | a dahlia | a cornflower | a crocus
growing: covered in dew | on a dark background | in morning frost | in full bloom | with a bee on it | in the rain
    | seen from below | just opening | {spot}
spot: in a meadow | beside a stone wall | in a crack in the pavement | among tall grass | at the edge of a wood
plant: a cactus | a fern | a bonsai tree | a monstera | an aloe | a string of pearls plant | a snake plant
    | a venus flytrap | a basil plant | a small olive tree | a rubber plant | a pitcher plant | an ivy
potted: in a terracotta pot | in a glass jar | on a windowsill | in a tin can | on a sunny balcony | in an old teacup
    | against a white wall | in a greenhouse
vase: in a glass jar | in a blue vase | on a wooden stool | in an old teapot | on a kitchen table | wrapped in paper
tree: an old oak | a weeping willow | a cherry tree | a birch | a cypress | a maple | a redwood | a twisted olive tree
    | a lemon tree | a fir | a chestnut tree | an apple tree
season: in autumn | in spring | in winter | in the fog | in a storm | at night | with exposed roots | full of birds
    | {place}
place: on a hill | beside a pond | in an empty field | in a courtyard | at a crossroads | behind a stone wall
fungus: a red toadstool | a cluster of small mushrooms | a giant glowing mushroom | a patch of moss | a bracket fungus
    | a clover with four leaves | a fallen oak leaf | a pine cone | an acorn | a fiddlehead
ground: on the forest floor | on a rotting log | among wet leaves | between roots | on a mossy stone | after the rain
    | beside a stream
flowers: tulips | lavender | wildflowers | poppies | dahlias | cornflowers | daffodils | anemones | marigolds | peonies
photo: nature photograph | photo | close-up photo | film photo | photograph | garden photo | black and white photo
picture: botanical illustration | watercolor painting | oil painting | ink drawing | pressed flower collage
    | linocut print | pencil drawing | art nouveau illustration | gouache painting | 3D render | pixel art scene
    | paper cut-out | Japanese woodblock print | embroidery | cyanotype | stained-glass window | pastel drawing
    | impressionist painting | flat vector illustration | line drawing | felt sculpture | scientific drawing
shot: a close-up | a side view | a detailed view | a low-angle shot
light: soft morning light | backlight | dappled light | overcast light | golden hour | diffused light | side light
    | a single beam of light | bright daylight | rim light
detail: drops of water | a blurred green background | a small insect | fine veins | curled edges
    | a spider web at one side | soft colors behind | a few fallen leaves | delicate texture
view: close-up | side view | centered composition | filling the frame | low angle | rule of thirds
    | off-center framing
closing: nothing distracts from the plant | the edges fade into white | every vein is clear | only a few tones are used
"""

FANTASY = """
subject: {being} {act} | {being} {act} | {being} {act} {realm} | {place} | {place} {sky} | {machine} {lost} | {odd}
clause: {being} is {act} {realm} | {machine} stands {alone} | {being} is {act}
being: a dragon | a young wizard | a griffin | a stone giant | a forest spirit | a mermaid | a kraken
    | a witch with a raven | a knight in rusted armor | a centaur | a tiny fairy | a friendly troll | a minotaur
    | a goblin merchant | a ghost | a yeti | a golem covered in moss | a dwarf smith | an owl in a coat
    | a mouse knight | a moon rabbit | a druid | a fox in a cloak | an old alchemist | a sphinx
act: reading a map | sleeping | drinking tea | holding a lantern | guarding a gate | watching the stars
    | playing a flute | waking up | looking into a well | telling a story | hiding behind a rock | painting a door
    | sitting on a throne | writing in a huge book | resting by a fire
realm: in an enchanted forest | on a floating island | in a crystal cave | in a ruined temple | above the clouds
    | in a mushroom village | in a sunken city | in an endless library | under two moons
place: a castle on a floating island | a city inside a giant tree | a library without an end | a village of mushrooms
    | a stairway into the clouds | a gate in an old forest | a city under a glass dome | a domed colony on Mars
    | a market on an alien planet | a ruined starship in a desert | an underwater palace
    | a neon street in the year 2200 | a bridge between two worlds | a lighthouse at the edge of space
    | a giant clockwork garden | a train station on the moon | a school for young dragons | a harbor for airships
sky: under a green sky | at night | in heavy rain | at sunrise | in thick fog | in a sandstorm | on a feast day
machine: a rusty robot | a walking house | a giant mech | a small spaceship | a clockwork bird | a robot gardener
    | a maintenance robot | a time machine | a flying bathtub | a mechanical spider | a steam-powered elephant
lost: watering flowers | above a quiet town | covered in vines | feeding birds | at the bottom of the sea | {alone}
alone: in a wheat field | in a junkyard | in a snowstorm | on a distant planet | in a neon-lit alley | on a lonely hill
odd: a teacup with a storm inside | a whale swimming through clouds | a door standing in the desert
    | an astronaut riding a horse | a piano made of water | a city on the back of a turtle | a staircase of books
    | a tree with lamps instead of fruit | a melting clock on a branch | an elephant as small as a mouse
    | a house made of bread | a chair taller than a tower | a fish in a suit reading the news | a cloud in a birdcage
    | a violin growing leaves | a moon used as a lamp
photo: cinematic still | film still | photo | movie scene | photorealistic image | 35mm photograph
picture: concept art painting | digital painting | oil painting | book cover painting | anime illustration
    | ink drawing | watercolor painting | 3D render | pixel art scene | storybook painting | stained-glass window
    | woodcut print | comic book panel | matte painting | low-poly render | claymation scene | surrealist painting
    | art nouveau illustration | tarot card without words | children's book illustration | isometric 3D render
    | engraving | paper diorama
shot: a wide shot | a close-up | a low-angle shot | a distant view | a medium shot
light: glowing light | moonlight | golden hour | volumetric light | neon light | firelight | misty light
    | dramatic light | light from below | rays of light through dust | candlelight
detail: glowing runes on the ground | fireflies all around | floating dust | a huge moon behind | tiny figures below
    | tangled vines and cables | sparks in the air | a long banner | fallen leaves | an old sword left behind
view: wide shot | low angle | close-up | from above | centered composition | small in a vast scene
    | symmetrical composition | side view
mood: epic | mysterious atmosphere | dreamlike | whimsical | ominous | wondrous | melancholic mood | serene | playful
    | heroic | eerie
lens: 35mm lens | wide-angle lens | anamorphic lens | film grain | fine detail | shallow depth of field
"""

DESIGNS = """
prompt: {pattern} | {pattern}, {palette} | {pattern}, {finish} | {pattern}, {palette}, {finish} | {icon}
    | {icon}, {finish} | {icon}, {palette}, {finish} | {abstract} | {abstract}, {palette} | {abstract}, {technique}
    | {texture} | {texture}, {tones} | {abstract} in {palette}, {technique}, {mood}
    | ^{abstract}. {technique}, {palette}, {finish} | {texture}, {palette} | {poster}, {palette}
    | {poster}, {finish}, {palette} | ^{abstract}, with {accent}. {mood}, {technique}
pattern: seamless pattern of {motif} | wallpaper with {motif} | repeating pattern of {motif} and {motif}
    | tile design with {motif} | textile print with {motif} | wrapping paper with {motif} and {motif}
    | a block print of {motif}
motif: lemons and leaves | small foxes | cherry blossoms | waves | ferns | triangles | dots and dashes
    | moons and stars | swallows | mushrooms | pineapples | koi fish | clouds | feathers | mountains | hexagons
    | paisley shapes | olives | sailboats | cacti | bees | overlapping circles | zigzag lines | tulips | cats
    | dragonflies | ginkgo leaves
icon: minimal icon of {emblem} | flat icon of {emblem} | logo with {emblem}, no letters | sticker of {emblem}
    | enamel pin of {emblem} | app icon with {emblem} | line icon of {emblem} | a round badge with {emblem}
    | emblem of {emblem}, simple shapes
emblem: a mountain | a fox head | a paper plane | a coffee cup | a leaf | a whale | an owl | a lighthouse
    | a crescent moon | a bicycle | a key | an acorn | a lightning bolt | a bee | a sailboat | a cactus | a rocket
    | a bear | a flame | an anchor | a tree | a camera | an umbrella | a koi fish | a hummingbird
abstract: abstract composition of {form} | {form} overlapping {form} | an abstract painting of {form}
    | {form} on {ground} | minimalist arrangement of {form} | {form} dissolving into {form} | a study of {form}
form: thin black lines | soft circles | torn paper shapes | flowing ribbons | concentric rings | floating cubes
    | bold stripes | drops of ink in water | spirals | fragments of glass | liquid marble | a grid of squares
    | blurred shapes | smoke | crossing diagonals | a single brushstroke | arches and half circles
    | thick layers of paint | tangled threads | ripples
ground: a white background | a black background | raw canvas | beige paper | a soft gradient | gray concrete
    | deep blue
technique: screen print | oil on canvas | watercolor wash | digital art | gouache on paper | 3D render
    | ink on rice paper | paper collage | linocut print | airbrush | generative art | acrylic pour | risograph print
    | fresco | felt
texture: close-up texture of {stuff} | macro photo of {stuff} | {stuff} seen from above | background of {stuff}
    | surface of {stuff}
stuff: cracked clay | rusted metal | woven straw | old leather | wet sand | peeling paint | tree bark | crumpled paper
    | frosted glass | blue velvet | polished marble | moss | fish scales | brushed steel | coffee beans | knitted wool
    | cracked ice | terracotta tiles | oil on water | feathers | slate | rope | honeycomb | weathered wood | gravel
tones: side light | soft shadows | even light | sharp focus | muted colors | fine detail | high contrast
poster: travel poster of {sight}, without text | poster with {sight}, no words | postage stamp design with {sight}
    | book cover art of {sight}, no title | album cover with {sight}, no lettering | playing card design with {sight}
    | stage set with {sight} | greeting card with {sight}, no text
sight: a volcano and palm trees | a lone astronaut | a jazz band in silhouette | a sailboat under a large sun
    | a snowy village | a running horse | two hands holding a bird | an old lighthouse | a night train
    | a woman with a parasol | desert arches | a diver among fish | a hot air balloon | a red bridge in fog
    | a cabin under the stars | a pair of swans
accent: one bright red dot | a thin gold line | rough edges | visible grain | a hint of blue | wide margins
    | one broken line | strong shadows | a pale center
finish: flat colors | clean lines | bold outlines | rounded shapes | high contrast | subtle grain | geometric
    | minimalist | hand-drawn look | vector style | soft gradients | plain background | symmetrical
mood: calm | energetic | playful | harmonious | restless | balanced | hypnotic | austere | dreamlike
"""

# Shares of the prompts, in hundredths.
KINDS = (
    (14, PEOPLE),
    (5, PORTRAITS),
    (6, WILDLIFE),
    (4, BIRDS),
    (5, PETS),
    (2, SEA),
    (2, INSECTS),
    (11, LANDSCAPES),
    (10, CITIES),
    (5, ROOMS),
    (8, FOOD),
    (6, VEHICLES),
    (8, OBJECTS),
    (4, PLANTS),
    (5, FANTASY),
    (5, DESIGNS),
)
DAY = (
    r"\bsun\b|sunlit|sunlight|sunrise|sunset|golden hour|morning|daylight|overcast|midday|afternoon|dawn|dusk|pale sky"
)
# Pairs of regular expressions of which a prompt, in small letters, matches one at most.
CLASHES = (
    (
        "close-up|tight|macro|headshot|head and shoulders|detailed view|50mm|85mm|105mm",
        r"\bwide|panora|distant|aerial|drone|far away|full|vast|empty space|landscape",
    ),
    (
        "overhead|(seen|view) from above|, from above|flat lay|bird's-eye|aerial|drone photo|high angle",
        "low.angle|eye level|side view|frontal|below|profile|behind|horizon|three-quarter|45-degree|street level|corner"
        "|framed by|from a window|plenty of sky|straight at",
    ),
    ("low.angle|below", "eye level|high angle|high horizon|detailed view"),
    (
        "from behind|looking away|in profile|far away",
        r"eyes|smile|\bface|expression|gaze|grin|straight at|curious look",
    ),
    ("side view|in profile|profile view|three-quarter", "frontal|from behind|eye level|straight at|corner view"),
    (r"night|\bmoons?\b|moonlight|stars\b|starry|northern lights|candle|firelight|lamplight|fireflies", DAY),
    (
        r"fog|\bmist|storm|\brain\b|rainy|overcast|low clouds|cloudy|lightning|underwater|cave",
        r"\bsun\b|sunlight|golden hour|clear sky|midday|moonlight|starry|long shadow|rainbow|hard light",
    ),
    ("dawn|sunrise|morning", "dusk|sunset|evening|afternoon|last light|midday|blue hour|golden hour"),
    ("dusk|sunset|evening|last light|blue hour|golden hour", "midday|afternoon|overcast|daylight"),
    (
        r"(?<!colored )pencil|charcoal|\bink|etching|engraving|line draw|blueprint|woodcut print|black and white"
        "|cyanotype|(technical|patent|cutaway|scientific) drawing|architectural sketch|urban sketch|chalk",
        "colors|palette|vivid|red and gold|teal|pinks|shades of|greens|ochre|lavender and|earth tones|golden"
        "|splash of red",
    ),
    ("summer|tropical|desert|jungle|savanna", r"snow|frost|winter\b"),
    ("nobody|lone|abandoned|empty", "people|crowd|hand reaching|busy"),
    (
        "sleeping|yawning|closed eyes|asleep",
        r"curious|look\b|looking|straight at|concentration|eyes (and|are)|open beak",
    ),
    ("minimal|simple", "intricate|highly detailed|a detailed"),
    ("film|35mm|50mm|85mm|medium format|analog|lens", "4k|phone photo|polaroid|studio photo"),
    ("35mm photo|film photo|film still|polaroid|vintage|analog", "lens|medium format|muted film"),
)


@cache
def default_prompts() -> tuple[str, ...]:
    """Returns the prompts, the same on every machine, in an order in which all kinds of subjects alternate."""
    generator = random.Random(SEED)
    turns = [grammar for share, text in KINDS for grammar in [{**_read(COMMON), **_read(text)}] * share]
    found = dict[str, None]()
    while len(found) < COUNT:
        if len(found) % len(turns) == 0:
            _shuffle(turns, generator)
        grammar = turns[len(found) % len(turns)]
        while not _is_fit(prompt := _polish(_expand("{prompt}", grammar, generator))) or prompt in found:
            pass
        found[prompt] = None
    return tuple(found)


def _read(text: str) -> dict[str, list[str]]:
    """The options of each name of a grammar."""
    lines = re.sub(r"\n +", " ", text.strip()).split("\n")
    parts = (line.split(":", 1) for line in lines)
    return {name: [option.strip() for option in options.split("|")] for name, options in parts}


def _choose(options: Sequence[str], generator: random.Random) -> str:
    """An option, by `random`, the one method whose numbers Python promises not to change."""
    return options[int(generator.random() * len(options))]


def _shuffle(items: list[dict[str, list[str]]], generator: random.Random) -> None:
    for last in range(len(items) - 1, 0, -1):
        other = int(generator.random() * (last + 1))
        items[last], items[other] = items[other], items[last]


def _expand(text: str, grammar: Mapping[str, Sequence[str]], generator: random.Random) -> str:
    """Replaces names in braces by options; {bare} is a {subject} without its article."""

    def replace(match: re.Match[str]) -> str:
        if match[1] == "bare":
            return re.sub("^(a|an|the) ", "", _expand("{subject}", grammar, generator))
        return _expand(_choose(grammar[match[1]], generator), grammar, generator)

    return re.sub(r"\{(\w+)\}", replace, text)


def _polish(text: str) -> str:
    """Makes "a" before a vowel "an", and sentences of what begins with ^."""
    text = re.sub(r"\ba (?=[aeio]|u(?!ni|k))", "an ", text)
    if text.startswith("^"):
        text = ". ".join(part[0].upper() + part[1:] for part in text[1:].split(". ")) + "."
    return text


def _is_fit(text: str) -> bool:
    """Whether a prompt has neither too few words, nor too many, nor one of them twice, and nothing in it clashes."""
    lower = text.lower()
    words = re.findall(r"[\w'-]+", lower)
    said = [word for word in words if len(word) > 2 and word not in REPEATED]
    fits = FEWEST_WORDS <= len(words) <= MOST_WORDS and len({*said}) == len(said)
    return fits and not any(re.search(one, lower) and re.search(other, lower) for one, other in CLASHES)
