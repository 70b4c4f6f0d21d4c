"""The letters of the glyphs: 711 code points, pinned, because fonts change between releases.

No composed letters; only letters that at least 8 of 16 typefaces have, and no two that look alike (a
correlation of .93 or more between the size-normalised pictures). Of two look-alikes, the first was kept.
"""

from __future__ import annotations

LETTERS = {
    "Latin": (
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijkmnopqrstuvwxyzÆÐØÞßæðøþ"
        "đĦħıĸŁłŊŋŒœŦŧƀƁƂƃƄƅƆƇƈƊƋƌƍƎƏƐƑƒƓƔƕƖƗƘƙƚƛƜƝƞƟƢƣƤƦƧƨƩƪƬƭƮƱƲƳƴƵ"
        "ƶƷƸƺƻƼƽƾƿǁǂǝǤǥǶǷȜȡȢȣȤȥȴȵȶȸȹȺȻȼȽȾȿɀɁɂɃɄɅɆɇɈɉɊɋɌɍɎɏɐɑɒɔɕɖɗɘɚɛɜ"
        "ɝɞɠɢɣɤɥɦɧɨɩɪɫɬɭɮɯɰɱɲɳɴɵɶɷɸɹɺɻɼɽɾɿʀʁʂʃʄʅʆʇʈʉʊʋʌʍʎʏʐʑʒʓʔʕʖʗʙʚʛ"
        "ʜʝʞʟʠʡʢʣʤʥʦʧʨʩʪʫʬʭʮʯᴀᴁᴂᴃᴆᴇᴈᴉᴊᴌᴑᴒᴓᴔᴖᴗᴘᴙᴚᴜᴝᴞᴟᵻᵽᶅẜẝẞỺỻℲⅎⱠⱡⱣⱤⱨⱩⱪ"
        "ⱫⱬⱭⱮⱱⱲⱳⱷⱹⱺⱾⱿꜢꜣꜤꜧꜨꜩꜫꜲꜳꜴꜵꜶꜷꜸꜹꜼꜽꝀꝁꝆꝇꝊꝋꝎꝏꞂꞃꞋꞎꞐꞑꞪꟻꟼꟽꟿ"
    ),
    "Greek": ("ͰͱͲͳͶͷͼͽΓΔΞΠΦΨΩαβγδζθκλνξπςστυφχψωϏϗϘϚϛϝϞϟϠϡϺϻϼᴨᴪ"),
    "Cyrillic": ("ЂЄЉЊЋЏДЖЗКЛУФЦЧШЩЪЫЬЭЮЯбгдлмптфцчшщъыьэюяђљњћџѢѣѤѥѪѫѬѭѰѱѴҍҐґҒғҔҕҖҘҙҚҞҟҠҡҢңҤҥҦҧҬҭҰұҲҳҴҵҶҷҺӃӇӈӋӌӶԒԓԔԕꙐꙑꙔꙕꙖꙗ"),
    "Armenian": ("ԱԲԳԴԵԶԷԸԹԺԻԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՎՏՐՒՓՔՖբգդեէըթժիլխծկձճմնշչջռվտրփքֆ"),
    "Lao": ("ກຂຄງຈຊຍດຕຖທນບປຜຝພມຢຣລວສຫອຮຯະາ"),
    "Georgian": (
        "ႠႡႢႣႤႥႦႧႨႩႪႫႬႭႮႯႰႱႲႳႴႵႶႷႸႹႺႻႼႽႾႿჀჁჂჃჄჅაბგდევზთიკლმნოპჟრსტუფქ"
        "ღყშჩცძწჭხჯჰჱჲჳჴჵჶჷჸჹჺⴀⴁⴂⴃⴄⴅⴆⴇⴈⴉⴊⴋⴌⴍⴎⴏⴐⴑⴒⴓⴔⴕⴖⴗⴘⴙⴚⴛⴜⴝⴞⴟⴠⴡⴢⴣⴤⴥ"
    ),
}
"""The letters of each script, in code point order."""
