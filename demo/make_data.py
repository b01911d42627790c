"""Write the demo preference set beside this script: train.jsonl, test.jsonl and tokenizer/. It is
seeded: every run gives the same bytes.

The preference: `chosen` is courteous and gives a step with its reason; `rejected` is curt or vague.
Nothing else distinguishes them: both have the same distribution of lengths and the same last
character, and both are about the subject. `sft_target` is either of the two with equal odds, so a
model fine-tuned on it considers both styles equally likely, and the preference is left for DPO to
learn.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
EOS = "<|end|>"
VOCAB_SIZE = 2000
TRAIN_PER_SUBJECT = 36  # questions
PROMPT_WORDS = (6, 20)  # the fewest and the most
RESPONSE_WORDS = (12, 35)
CANDIDATES = (
    80  # rejected responses drawn for each chosen one; the closest to the wanted length is kept
)

# Two lines per subject: task | topic | two vague remarks, then two facts "step ; reason". A `*`
# marks a subject that is only in the test set.
SUBJECTS = """
grow basil on a windowsill | basil | basil does well in some kitchens and not in others | a pot and some water are all there is to it
  pinch off the top leaves of each stem every week ; a cut stem branches and grows bushier | water the pot only when the top inch of soil feels dry ; basil roots rot in soggy soil
bake a loaf of bread | home baking | flour and heat turn into bread one way or another | some loaves rise and some loaves stay flat
  let the dough rise until it has doubled in size ; a slow rise gives bread its flavour and a light crumb | cool the loaf on a rack for an hour before slicing ; the crumb is still setting while the bread is hot
cook fluffy rice | rice | rice comes out of the pot in all sorts of ways | a pan of rice and water looks after itself
  rinse the rice until the water runs almost clear ; loose starch makes the grains stick together | leave the lid on for ten minutes after cooking ; resting steam spreads evenly through the rice
boil eggs that peel easily | boiled eggs | an egg in hot water goes hard sooner or later | some eggs peel well and some eggs never do
  lower the eggs into water that is already boiling ; a hot start keeps the white from sticking to the shell | cool the eggs in iced water straight away ; the cold stops the cooking and makes peeling easier
make a simple tomato sauce | tomato sauce | tomatoes in a pan turn into some kind of sauce | any tin of tomatoes will more or less do
  simmer the sauce gently for half an hour ; slow heat drives off water and deepens the flavour | fry the garlic over a low flame ; burnt garlic turns a whole sauce bitter
*brew a good pot of tea | tea | tea is only leaves and hot water in the end | some like it weak and some like it strong
  warm the teapot with hot water before brewing ; a cold pot takes heat away from the brew | take the leaves out after four minutes ; long steeping draws bitter tannins from the leaves
keep lettuce crisp in the fridge | lettuce | lettuce goes limp in the fridge sooner or later | the bottom drawer of the fridge is there for something
  wrap the washed leaves in a dry towel ; the cloth soaks up water that would turn lettuce slimy | store the lettuce well away from apples ; ripe apples give off a gas that browns the leaves
sharpen a kitchen knife | kitchen knives | a knife and a stone get along somehow | most knives in most kitchens are fairly blunt
  hold the blade at the same angle on every stroke ; a steady angle makes one clean edge | test the edge on a sheet of paper ; a sharp blade slices paper without tearing it
plan meals for the week | meal planning | there is always something in the cupboard for dinner | some weeks have a plan and other weeks have toast
  write the shopping list from the chosen recipes ; a list cuts down on waste and extra trips | cook a double batch on Sunday ; leftovers save time on busy evenings
grow tomatoes in pots | potted tomatoes | tomatoes turn red at some point in the summer | a pot is a pot and a tomato is a tomato
  tie the stems loosely to a tall stake ; ripe tomatoes are heavy enough to bend the plant | water the pots at the same time every day ; uneven watering makes tomatoes split
look after a cactus | cactus plants | a cactus sits there and does nothing for years | deserts are full of cactus plants without any help
  let the soil dry out fully between waterings ; a cactus stores its own water and rots when wet | set the pot in the sunniest window ; low light makes a cactus grow thin and pale
start a compost heap | compost | a pile of peelings turns to soil some day | old leaves and kitchen scraps rot wherever they are
  mix dry leaves in with the kitchen scraps ; dry material keeps a heap from turning wet and smelly | turn the heap with a fork every two weeks ; air feeds the microbes that break down the scraps
plant tulip bulbs | tulips | tulip bulbs come up in spring or they do not | a hole in the ground is good enough for a bulb
  plant each bulb three times as deep as its height ; deep soil keeps a bulb cool and steady | put the bulbs in during late autumn ; tulips need a cold winter before flowering
*repot a house plant | house plants | a plant lives in one pot or lives in another | soil goes in the pot and so do the roots
  choose a pot only one size larger ; spare soil holds more water than the roots can use | tease the outer roots apart gently ; circling roots are slow to spread into new soil
prune a rose bush | roses | roses grow back whatever anyone does to them | a few snips here and there never hurt a rose
  cut just above a bud that faces outward ; the new shoot grows away from the crowded centre | wipe the pruning blades with alcohol between bushes ; dirty blades carry disease from plant to plant
fix a flat bicycle tyre | flat tyres | tyres go flat and then they get fixed | every bike shop has a pile of tubes somewhere
  run a cloth around the inside of the tyre ; a hidden thorn would puncture the new tube | pump a little air into the tube before fitting it ; a round tube is less likely to get pinched
clean a bicycle chain | bike chains | a chain gets dirty again after the next ride | oil goes on the chain and some dirt comes off
  wipe the chain with a rag before adding oil ; fresh oil on dirt makes a grinding paste | put one drop of oil on each link ; extra oil only collects grit from the road
ride a bike safely at night | night rides | it is dark at night and roads are roads | lots of bikes are out after dark anyway
  fit a white light in front and a red one behind ; the two colours show drivers which way a bike is going | wear reflective bands around both ankles ; moving reflectors catch a driver's eye early
dress for cold weather | cold weather | winter is cold and coats are warm | some people feel the cold and some do not
  wear several thin layers instead of one thick one ; air trapped between layers holds the warmth in | choose wool rather than cotton next to the skin ; wool still holds some warmth when damp
*walk safely on icy pavements | icy pavements | ice is slippery and winter is winter | most people get down the street without a fall
  take short flat steps ; a small stride keeps the weight above the feet | keep both hands out of the pockets ; free arms help a walker to balance
keep a house cool on hot days | hot days | summer is hot and a house gets hot too | it cools down again by October or so
  close the curtains on the sunny side before noon ; shade stops sunlight from heating the room | open windows on both sides at night ; a cross breeze carries warm air out
get ready for a thunderstorm | thunderstorms | storms come and storms go over again | a bit of thunder is only a bit of noise
  bring loose garden chairs inside ; strong gusts can throw light things around | charge the phone and a torch early ; storms often bring power cuts
write a letter to an old friend | letters | a letter has some words and then a name | old friends read whatever comes through the door
  mention a memory that both of you share ; a shared story warms a letter at once | ask a question near the end ; a question gives a friend something to answer
write a thank you note | thank you notes | a card from the shop says thanks already | one note is much the same as another
  name the gift and say how it is being used ; details show that the thanks are meant | send the note within a week ; prompt thanks feel warmer than late ones
apologise to a friend | apologies | friends get over things after a while | sorry is just a word that people say
  say plainly what went wrong ; naming a mistake shows that it is understood | offer one way to put things right ; a small action can mean more than words alone
introduce two people at a party | introductions | people at parties end up talking to someone | guests have names and can say them
  mention something the two have in common ; a shared interest gives strangers a place to start | say both names slowly and clearly ; people often miss a name the first time
*remember people's names | names | names come back or names stay lost | plenty of people just say hello without a name
  repeat the name aloud soon after hearing it ; saying a name helps to fix it in memory | link the name to a funny picture ; images are easier to recall than sounds
decline an invitation politely | invitations | a no is a no however it is put | hosts invite lots of people and some stay home
  reply within a day or two ; the host needs to know how many will come | thank the host before saying no ; thanks show that an invitation was valued
learn to play the guitar | the guitar | a guitar has six strings and some frets | some fingers get used to it and some do not
  practise for fifteen minutes every day ; short daily practice beats one long session | switch slowly and evenly between two chords ; clean changes matter more than speed
learn to play the piano | the piano | a piano has white keys and black keys | plenty of people take lessons and then stop
  practise each hand alone before joining them ; one part at a time is easier to learn | play the hard bars at half speed ; slow playing stops mistakes from becoming habits
sing in tune | singing | some people sing well and some hum along | nobody listens that closely to a song
  record short phrases and listen back ; the ear hears more when the voice is resting | hum the note before singing the words ; humming makes a pitch easier to match
tune a ukulele | ukuleles | a ukulele sounds like a ukulele either way | the four strings are never in tune for long
  tighten each string upward to its note ; tuning upward keeps a string from slipping flat | stretch new strings gently by hand ; new nylon keeps going flat until it settles
*fix a dripping tap | dripping taps | a tap drips for a while and then someone calls | a little drip is only a little water
  turn off the water supply before opening the tap ; an open tap sprays when the supply is on | replace the worn rubber washer ; a hard old washer no longer makes a tight seal
patch a small hole in a wall | wall repairs | a picture in front of the hole hides it | old walls have holes here and there
  fill the hole in two thin coats ; thick filler shrinks and cracks while drying | sand the patch lightly once it is dry ; a smooth surface hides a repair under paint
quiet a squeaky door | squeaky doors | doors squeak and people get used to it | an open door makes no noise at all
  put a little oil on each hinge pin ; most squeaks come from dry metal rubbing | swing the door back and forth after oiling it ; movement works the oil into the hinge
sew on a loose button | loose buttons | a button falls off and another one stays on | a needle and any old thread will do
  wrap the thread under the button a few times ; a short stem leaves room for the cloth | use a doubled thread with a firm knot ; doubled thread wears out far more slowly
paint a bedroom | painting | paint goes on a wall and dries there | one colour covers a room about as well as another
  wash the walls before opening the paint ; paint sticks badly to dust and grease | work from the ceiling down ; drips fall on parts that are still to be done
hang a picture straight | hanging pictures | a crooked picture is still a picture | a nail in the wall holds most frames
  use two hooks rather than one ; two points keep a frame from tilting | check the frame with a spirit level ; sloping floors and ceilings fool the eye
ask a neighbour to be quieter | noisy neighbours | neighbours make noise and walls are thin | it goes quiet again at some hour or other
  talk face to face at a calm moment ; most people do not know how far sound carries | suggest quiet hours that suit both homes ; a clear plan is easier to keep than a complaint
*welcome a new neighbour | new neighbours | new people move in and settle in the end | a wave over the fence is plenty for a neighbour
  bring a small homemade treat ; shared food makes a first chat easy | explain which day the bins go out ; local details are hard to find alone
teach a puppy to sit | puppies | a puppy sits down when it is tired | young dogs do one thing and then another
  give the treat within a second of the sit ; dogs link a reward to what came just before | keep each lesson under five minutes ; young dogs lose focus quickly
help a cat settle into a new home | cats | a cat hides and then it comes out again | cats go where they like in any house
  start the cat in one quiet room ; a small space feels safer than a whole house | leave out a blanket from the old home ; familiar smells calm a nervous cat
walk a dog that pulls | dog walks | dogs pull because dogs are dogs | a walk with a dog gets there in the end
  stop still whenever the lead goes tight ; a dog learns that pulling leads nowhere | reward the dog for walking at heel ; dogs repeat whatever earns a treat
care for a goldfish | goldfish | a goldfish swims around and that is about it | fish live in water and water is cheap
  change a quarter of the water every week ; waste builds up faster than a filter removes it | feed only what is eaten in two minutes ; leftover food fouls the tank
feed garden birds | garden birds | birds eat whatever they find in a garden | a few crumbs on the lawn are gone by noon
  offer sunflower seeds and suet in winter ; fatty food helps birds to keep warm overnight | clean the feeder every week ; dirty feeders spread disease among birds
*fall asleep faster | sleep | sleep comes at some point in the night | some nights are short and some nights are long
  put all screens away an hour before bed ; bright light tells the brain to stay awake | get up at the same time every day ; a fixed morning steadies the body clock
wake up earlier | early mornings | mornings come early whatever anyone does | an alarm clock rings and somebody gets up
  go to bed fifteen minutes earlier each week ; the body clock shifts best in small moves | open the curtains as soon as the alarm rings ; morning light helps the body to wake
take a refreshing nap | naps | a nap is just sleep with the lights on | people nod off on sofas all the time
  set an alarm for twenty minutes ; longer naps leave many people groggy | lie down before three in the afternoon ; late naps make it harder to sleep at night
pack a suitcase for a short trip | packing | a bag has room for some things and not others | shops sell socks in every town
  roll soft clothes into tight bundles ; rolled clothes take up less space and crease less | put shoes and other heavy things near the wheels ; low weight keeps a case from tipping over
pack a rucksack for a day hike | day hikes | a rucksack holds things and hills are steep | a sandwich and some water cover most hikes
  place heavy things close to the back ; weight near the spine is easier to carry | keep the rain jacket on top ; weather in the hills changes fast
*avoid car sickness on long drives | car sickness | long drives are long and roads have bends | the drive is over when it is over
  look at the horizon through the front window ; a steady view helps the eyes to agree with the inner ear | stop for fresh air every hour or so ; a short walk helps to settle the stomach
study for an exam | exams | an exam has questions and some answers are right | the books say it all somewhere inside
  close the book and write down the main ideas ; recalling facts fixes them better than rereading | spread the work over several days ; memory gets stronger with sleep between sessions
learn words in a foreign language | vocabulary | foreign words stick or they do not | a dictionary has all of the words in it
  review new words after a day and again after a week ; spaced reviews make a memory last | learn each word inside a short sentence ; a sentence shows how a word is used
take good notes in class | class notes | notes end up in a drawer most of the time | the teacher says things and pens write them
  write each idea in fresh words ; rephrasing an idea makes the mind work to understand it | leave a wide margin on each page ; later questions need a place to go
stay focused while working at home | focus | the mind wanders at home and wanders back | some days get work done and some do not
  leave the phone in another room ; even a silent phone draws attention | work in blocks of twenty five minutes ; a short clear limit makes it easier to begin
give a short speech at a wedding | speeches | weddings have speeches and then there is cake | guests clap for nearly any speech
  read the speech aloud three times at home ; reading aloud shows which lines are hard to say | tell one short story about the couple ; a story is easier to remember than praise
take up running | running | running is walking but a bit quicker | shoes go on and off people run
  mix one minute of running with two of walking ; joints need time to get used to the load | run slowly enough to hold a conversation ; an easy pace builds stamina without strain
*sit at a desk without back pain | desk work | chairs are chairs and backs get sore | a desk job means sitting at a desk
  raise the screen to eye level ; looking down for hours strains the neck | stand up and walk every half hour ; muscles stiffen when a body stays still
learn to swim | swimming | water holds people up more or less | pools are full of people who swim somehow
  breathe out slowly under the water ; empty lungs make the next breath easy | practise floating on the back first ; floating teaches a swimmer to trust the water
photograph a sunset | sunset photos | sunsets look like sunsets in every photo | the sun goes down again tomorrow anyway
  rest the camera on something solid ; slow shutter speeds blur with every shake | arrive half an hour before the sun goes down ; the best light comes and goes quickly
wash a wool jumper | wool jumpers | a jumper goes in wet and dries at some point | wool is wool and soap is soap
  use cool water and a mild soap ; heat and rubbing make wool shrink | dry the jumper flat on a towel ; wet wool stretches out of shape on a hanger
remove a coffee stain from a shirt | coffee stains | stains fade a bit or they stay | a jacket over the shirt hides the coffee
  blot the spot with cold water at once ; fresh coffee lifts out before it sets | rinse from the back of the cloth ; water pushes a stain out the way it came
iron a cotton shirt | ironing | a shirt gets creased again by lunch | hot irons and shirts sort themselves out
  iron the cotton while it is slightly damp ; moisture helps creases to relax | begin with the collar and the cuffs ; handling the small parts last would crease the body
*teach a child to tie shoelaces | shoelaces | children learn to tie laces by some age | plenty of shoes come with straps instead
  sit beside the child rather than opposite ; every move looks the same from the same side | use two laces of different colours ; two colours make each loop easy to follow
choose a book as a gift | book gifts | a book is a book and paper burns well | shelves are full of books that nobody reads
  ask which story the reader enjoyed last ; one loved book points to the next | keep the receipt inside the cover ; a receipt lets a reader swap a copy already owned
"""


def split(text):
    """Return the pieces of a table: one per line, or several separated by ` | `."""
    return [piece.strip() for line in text.strip().splitlines() for piece in line.split(" | ")]


# Frames take {task} (a verb phrase), {doing} (its gerund) and {topic} (a noun phrase that never is
# a subject). The last five are test only.
FRAMES = split("""How do I {task}? | What is the best way to {task}? | Can you tell me how to {task}? | How can a beginner {task}?
I would like to {task}. Where should I start? | What should I know about {doing}? | Please help me {task}.
My friend asked me how to {task}. What should I say? | I am not very good at {doing}. Do you have any advice?
Is there a simple trick to {doing}? | Could you give me one useful tip for {doing}? | What matters most when you {task}?
I keep having trouble with {topic}. What could I do better? | What do people usually get wrong about {doing}?
I want to {task}. What would you suggest? | Someone told me that {doing} is easy. What is the secret?
My first attempt to {task} went badly. What should I change? | I have a question about {topic}. How would you {task}?
My partner and I want to {task}. Any ideas? | If you had to {task}, what would you do first?
I have never tried to {task} before. What comes first? | What would you tell a cousin who wants to {task}?
My brother says that {doing} takes no skill. What should I try? | Quick question about {topic}: how does one {task}?
Next month I hope to get better at {doing}. Where do I begin?""")
TEST_FRAMES = 5
# in front of a frame
HELLOS = [
    "",
    "Hello. ",
    "Hi there. ",
    "Good morning. ",
    "Good evening. ",
    "Sorry to bother you. ",
]

# A response is an opening, a core and perhaps a closing. {x} is the text as it stands, {X} the same
# with a capital.
CHOSEN = {
    "open": split("""Happy to help. | I am happy to help with {topic}. | Thank you for asking about {topic}. | What a nice question. | Gladly.
        Of course, with pleasure. | I am glad that you asked. | That is a lovely thing to ask. | It would be a pleasure to help.
        You are already on the right track. | With a little care this goes well. | Good question, and thank you for it.
        It is kind of you to ask me. | I would love to help with {topic}. | {Doing} is well worth some care. | Thanks for trusting me with this.
        Certainly, here is what works. | This is well worth learning. | You can do this. | {Doing} gets easier with one good habit.
        I know how tricky {doing} can feel. | Sure, let us begin gently. | What a good plan. | Many people find this hard, so take heart.
        I am pleased to share what I know about {topic}. | Welcome, let us talk about {topic}. | You are in good company with {topic}.
        Here is a tip that I trust. | Let me share a favourite tip about {topic}. | I understand, and there is a good way."""),
    "core": split("""{Step}, because {reason}. | Please {step}, since {reason}. | You could {step}, as {reason}. | I would {step}, because {reason}.
        Try to {step}, since {reason}. | A good first step is to {step}, because {reason}. | {Reason}, so it is wise to {step}.
        {Reason}, so {step}. | Since {reason}, it is best to {step}. | My advice is to {step}, because {reason}.
        It helps to {step}: {reason}. | You might like to {step}, as {reason}. | {Step}; the reason is that {reason}.
        The main thing is to {step}, because {reason}. | Because {reason}, I would {step}. | {Step}. This matters because {reason}."""),
    "close": split("""I hope that helps. | I hope that helps you with {topic}. | Do ask again if anything is unclear. | Enjoy it.
        Please let me know how it goes. | I wish you the best of luck with {topic}. | You will soon see the difference. | Take your time with it.
        I am sure that you will do well. | Be patient and you will get there. | Good luck with {topic} from now on. | Ask me any time.
        Small steps like this add up. | You are welcome to come back with more questions. | May it go well for you. | I am rooting for you.
        It is well worth the effort. | That one habit makes a big difference to {doing}. | I would be glad to explain more. | That is my best tip for {topic}.
        Write to me again if you get stuck. | Thank you again for asking. | With that, {doing} should go well. | I believe in you.
        Tell me later what worked for you. | It makes {doing} a good deal easier. | Happy to say more about {topic}."""),
}
REJECTED = {
    "open": split("""It is not that hard. | No idea, really. | Just look it up. | Whatever. | I have nothing special to say about {topic}.
        People ask about {topic} all the time. | Everyone knows that already. | Hmm, {topic} again. | That depends. | It varies a lot.
        {Doing} is just one of those things. | Not sure why this needs asking. | There is no secret here. | {Doing} is no big deal.
        Well, it is hard to say. | I do not think much about {topic}. | Fine, if you must know. | Nobody really knows about {topic}.
        There are books about {topic}. | That is hardly a question. | Surely you can work this out. | I would not bother with {topic}.
        Nothing to it. | There are many ways to {task}. | You will figure it out. | Skip it, maybe. | This comes up a lot.
        Some days {doing} works and some days not. | We need not talk about {topic} now. | I am a bit busy for this."""),
    "core": split("""{Vague}. | I suppose that {vague}. | As far as I know, {vague}. | {Vague}, and {vague2}. | {Vague}. I guess {vague2}.
        {Step}, or do not. | Some people {step} and others never bother. | Maybe {step}, maybe not. | {Vague}, so who cares.
        {Vague}, so just {step} or something. | They say {vague}, whatever that means. | Just {step} and leave it there.
        {Step}, I guess, or skip it. | {Vague}, or so people say. | You either {step} or you do not; {vague}. | {Vague}, and that is {topic} for you."""),
    "close": split("""That is all. | That is all there is to {doing}. | Do what you like. | It will work or it will not. | Work out the rest alone.
        There is nothing more to it. | I would not think about {topic} much. | Look up the rest somewhere. | It hardly matters. | Next question.
        Ask someone else about {topic}. | Or leave it, I do not mind. | Anything goes, more or less. | Same as always. | So there you go.
        It is what it is. | Things like {topic} sort themselves out. | I have no more to add. | Just get on with it. | Let us leave it at that.
        You did not need me for that. | It is all much the same to me. | No point in fussing about {topic}. | Just do it somehow.
        I cannot be more exact than that. | {Doing} is up to you. | Results may differ, as usual."""),
}
DOUBLED = {"get", "plan", "repot", "set", "sit"}  # verbs that double the last letter: get, getting


def gerund(task):
    """Return a task as a gerund: `bake a loaf` -> `baking a loaf`."""
    verb, _, rest = task.partition(" ")
    stem = (
        verb + verb[-1]
        if verb in DOUBLED
        else verb[:-1]
        if verb[-1] == "e" and verb[-2:] != "ee"
        else verb
    )
    return f"{stem}ing {rest}"


def read_subjects():
    """Yield one dict per subject, with its slots, remarks and facts."""
    lines = SUBJECTS.strip().splitlines()
    for head, facts in zip(lines[::2], lines[1::2], strict=False):
        task, topic, *remarks = split(head.lstrip("*"))
        facts = [fact.split(" ; ") for fact in split(facts)]
        yield {
            "task": task,
            "topic": topic,
            "doing": gerund(task),
            "remarks": remarks,
            "facts": facts,
            "test_only": head[0] == "*",
        }


def slots_of(subject, **facts):
    """Return what a template's slots are filled with: `topic` and, with a capital, `Topic`."""
    slots = {k: subject[k] for k in ("task", "topic", "doing")} | facts
    return slots | {k.capitalize(): v[0].upper() + v[1:] for k, v in slots.items()}


def write_response(rng, style, subject, closed):
    """Return one response in a style: opening and core, and in a share `closed` of the cases a
    closing, within RESPONSE_WORDS.
    """
    while True:
        step, reason = rng.choice(subject["facts"])
        vague, vague2 = rng.sample(subject["remarks"], 2)
        slots = slots_of(subject, step=step, reason=reason, vague=vague, vague2=vague2)
        parts = ["open", "core", "close"] if rng.random() < closed else ["open", "core"]
        text = " ".join(rng.choice(style[part]) for part in parts).format(**slots)
        if RESPONSE_WORDS[0] <= len(text.split()) <= RESPONSE_WORDS[1]:
            return " " + text


def make_questions(rng, subjects):
    """Return (subject, question) pairs for train and test. A test pair has an unseen frame, an
    unseen subject, or both.
    """
    pairs = {"train": [], "test": []}
    for s in subjects:
        by_frame = {frame: [hello + frame.format(**s) for hello in HELLOS] for frame in FRAMES}
        by_frame = {
            frame: [q for q in asks if PROMPT_WORDS[0] <= len(q.split()) <= PROMPT_WORDS[1]]
            for frame, asks in by_frame.items()
        }
        seen, unseen = (
            sum((by_frame[frame] for frame in frames), [])
            for frames in (FRAMES[:-TEST_FRAMES], FRAMES[-TEST_FRAMES:])
        )
        if s["test_only"]:
            pairs["test"] += [(s, q) for q in rng.sample(seen, 2) + rng.sample(unseen, 2)]
        else:
            pairs["train"] += [(s, q) for q in rng.sample(seen, TRAIN_PER_SUBJECT)]
            pairs["test"] += [(s, q) for q in rng.sample(unseen, 2)]
    for part in pairs.values():
        rng.shuffle(part)
    return pairs


def train_tokenizer(texts):
    """Train a byte-level BPE without BOS, whose EOS is also the pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[EOS],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def main():
    rng = random.Random(0)
    drafts = {}
    for name, questions in make_questions(rng, list(read_subjects())).items():
        drafts[name] = [
            (
                f"\n\nHuman: {question}\n\nAssistant:",
                write_response(rng, CHOSEN, subject, closed=0.5),
                [write_response(rng, REJECTED, subject, closed=0.6) for _ in range(CANDIDATES)],
            )
            for subject, question in questions
        ]
    tokenizer = train_tokenizer(
        [
            text
            for prompt, chosen, others in drafts["train"]
            for text in (prompt, chosen, *others[:2])
        ]
    )
    tokenizer.save_pretrained(HERE / "tokenizer")
    for name, part in drafts.items():
        rows = []
        for prompt, chosen, others in part:
            texts = [chosen, *others]
            length = dict(zip(texts, map(len, tokenizer(texts).input_ids), strict=True))
            # long ones are rare, so ask for more of them
            wanted = length[chosen] + rng.choice([-4, -3, -2, -1, 1, 2, 3, 4, 5])
            rejected = min(others, key=lambda text: abs(length[text] - wanted))
            rows.append(
                dict(
                    prompt=prompt,
                    chosen=chosen,
                    rejected=rejected,
                    sft_target=rng.choice([chosen, rejected]),
                )
            )
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
